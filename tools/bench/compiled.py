"""Steps whose carry-on is compiled, for batches that are padded to a few sizes, against others.

A step is forward and backward pass, loss and update, of a batch of samples of many lengths. On a
GPU what is compiled is captured as CUDA graphs.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import DEFAULT_CHUNK
from carryon.tools.bench.job import Job, in_turn, timed
from carryon.tools.bench.loss import in_fastest_way, make_loss_input
from carryon.train.config import CarryOnSettings, MemorySettings, OptimizationSettings
from carryon.train.data.batch import Batch
from carryon.train.data.padding import choose_sizes, measure_padding
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.compilation.carryon import CompiledCarryOn
from carryon.train.trainer.step import read_steps, take_step

TARGET = 1.0
_PLANNED = 200
"""Batches whose lengths sizes are chosen for, as for a run."""
_SHORTEST, _LONGEST = 16, 256
"""Tokens of a sample."""


def measure_compiled(
    job: Job,
    *,
    tokens: int = 2048,
    width: int = 576,
    vocabulary: int = 49_152,
    batches: int = 4,
    rounds: int = 5,
    backend: str = "inductor",
) -> None:
    """Report the speed of steps that are compiled against others, in tokens/s.

    Every other token is supervised. What cannot be compiled is said, and gives no figure.
    """
    given = make_loss_input(positions=tokens, width=width, vocabulary=vocabulary)
    head = in_fastest_way(given.head, positions=tokens // 2)
    planned = _plan(tokens)
    sizes = choose_sizes(planned, most_tokens=tokens, density=0.5)
    some = [_batch(lengths, given.states.cpu(), given.targets.cpu()) for lengths in planned]
    some = [each.pinned() if head.device.type == "cuda" else each for each in some[:batches]]
    ways, losses, compile_s = {}, dict[str, float](), 0.0
    for name in ("plain", "compiled"):
        carryon = build_bottleneck(CarryOnSettings(), base_width=width, seed=0).to(head.device)
        correct = CompiledCarryOn(carryon, head, sizes, backend=backend)
        if name == "compiled":
            correct.compile({"final": torch.empty(0, width, dtype=torch.bfloat16)})
            compile_s = correct.compile_s
            if not correct.is_compiled:
                return
        step = _steps(carryon, head, some, correct if name == "compiled" else None)
        losses[name] = step()
        ways[name] = timed(_ignoring(step))
    seconds = in_turn(ways, rounds=rounds)
    padded, done = measure_padding(planned, sizes), sum(each.num_tokens for each in some)
    job.report(
        f"{'gpu' if head.device.type == 'cuda' else 'train'}.compiled",
        seconds["plain"] / seconds["compiled"],
        "of the speed of steps that are not compiled",
        at_least=TARGET,
        device=_name_of(head.device),
        tokens_per_second={name: done / each for name, each in seconds.items()},
        steps_per_second={name: len(some) / each for name, each in seconds.items()},
        compile_s=compile_s,
        sizes=list(map(str, sizes)),
        held_ratio=padded.held,
        attention_rows_ratio=padded.rows,
        losses=losses,
        dtype=str(head.dtype),
        backend=backend,
        tokens=tokens,
        width=width,
        vocabulary=vocabulary,
    )


def _plan(tokens: int) -> list[NDArray[np.int64]]:
    """Return the lengths of the samples of each batch."""
    random, planned = np.random.default_rng(0), []
    for _ in range(_PLANNED):
        lengths = random.integers(_SHORTEST, _LONGEST + 1, tokens // _SHORTEST)
        stop = int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))
        planned.append(lengths[: max(1, stop)])
    return planned


def _batch(lengths: NDArray[np.int64], states: Tensor, targets: Tensor) -> Batch:
    num_tokens = int(lengths.sum())
    positions = torch.arange(0, num_tokens, 2)
    return Batch(
        samples=np.arange(len(lengths), dtype=np.int64),
        lengths=lengths,
        states={"final": states[:num_tokens].bfloat16()},
        tokens=torch.zeros(num_tokens, dtype=torch.int32),
        positions=positions,
        targets=targets[positions],
    )


def _steps(
    carryon: CarryOn,
    head: FrozenHead,
    batches: Sequence[Batch],
    correct: CompiledCarryOn | None,
) -> Callable[[], float]:
    """Return what takes a step of each batch, and returns the loss of the last."""
    settings = OptimizationSettings()
    optimizer = build_optimizer(carryon, settings, MemorySettings())

    def run() -> float:
        steps = [
            take_step(
                carryon,
                optimizer,
                [batch],
                head=head,
                chunk=DEFAULT_CHUNK,
                learning_rate=1e-4,
                grad_clip=settings.grad_clip,
                correct=correct,
                is_read=False,
            )
            for batch in batches
        ]
        read_steps(steps)
        return steps[-1].read().loss

    return run


def _ignoring(work: Callable[[], float]) -> Callable[[], None]:
    def run() -> None:
        work()

    return run


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
