"""Preview a run: its size, its choices on this machine, its memory and its seconds.

Nothing is written. The first steps are taken and timed, and their weights thrown away.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress, show_seconds
from carryon.train.config import CarryOnSettings, LossSettings, TrainSettings
from carryon.train.data.datasets import open_data
from carryon.train.data.duration import TIMED_STEPS, Evaluations, seconds_per_token
from carryon.train.data.evaluation_set import count_evaluations
from carryon.train.data.loader import Stream, stream_bytes
from carryon.train.data.padding import PaddedSize
from carryon.train.kinds import get_kind
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_gain import evaluation_seconds
from carryon.train.modules.carryon import num_parameters
from carryon.train.trainer.choices import choose_products, keep_evaluated
from carryon.train.trainer.compilation.choice import choose_compilation
from carryon.train.trainer.distributed import join_processes
from carryon.train.trainer.forecast.memory_estimate import MemoryCase, plan_memory
from carryon.train.trainer.run import Job, Run, prepare_run
from carryon.train.trainer.trainer import describe, measure_halves, warn_about_held_out

_MOST_INNER = 262_144  # that settings allow; experts of a block are one matrix
_LEFT_OUT_STEPS = 1
"""First steps that set up memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """What a run would be."""

    samples: int
    """To train on."""
    tokens: int
    """Of these samples."""
    targets: int
    """Of these samples."""
    held_out_samples: int
    held_out_targets: int
    shared_ratio: float
    """Held-out targets that also occur in the training half; see contamination.py."""
    num_steps: int
    num_parameters: int
    """Weights to train."""
    device: str
    head_dtype: str
    loss_way: str
    compile: bool
    """Whether steps are padded and compiled: it was chosen, and works here."""
    padded_sizes: list[str]
    """See CompileSettings."""
    compile_s: float
    """Seconds that compiling takes at each start, which are not in `seconds`."""
    timed_steps: int
    step_s: float
    """Mean seconds of the timed steps, without the first."""
    seconds: float
    """Expected, of all steps and evaluations."""
    memory: dict[str, int]
    """Bytes of each part of the expected peak; see memory_estimate.py."""
    about: str
    """Data, steps, weights and device in a few lines."""

    @property
    def memory_bytes(self) -> int:
        """The expected peak."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without `about`."""
        document = asdict(self) | {"memory_bytes": self.memory_bytes}
        del document["about"]
        return document

    def summary(self) -> str:
        """Describe it in a few lines."""
        compiled = ""
        if self.compile:
            compiled = (
                f"compiled in {show_seconds(self.compile_s)}, which come on top, for batches of "
                f"{' '.join(self.padded_sizes)}\n"
            )
        return (
            f"{self.about}\n{compiled}"
            f"about {show_seconds(self.seconds)}, evaluations included: {self.step_s:.3g} s a step "
            f"by {self.timed_steps} steps, whose weights are thrown away\n"
            f"about {self.memory_bytes / 1e9:.2f} GB of memory; by part: carryon plan-memory"
        )


def preview_run(paths: Sequence[str], *, out: str | Path, settings: TrainSettings) -> Preview:
    """Preview what `train` would do with these arguments.

    A run that is in `out` already keeps its choices, but the preview is that of the whole run.

    Raises:
        InputError: as `train`; or other bases are mixed in, whose distributions take long.
        NotFiniteError: the loss of one of the first steps is not finite.
    """
    if settings.mixing.mix:
        raise InputError(
            "dry_run: expected a run without --mix, whose distributions would be computed first. "
            "Fix: carryon plan-memory --mix"
        )
    processes = join_processes(settings.run.device)
    if processes.size > 1:
        raise InputError(f"dry_run: expected one process, got {processes.size}")
    settings = settings.with_options(decoded_cache="")  # reading would write there
    data = open_data(paths, settings)
    job = keep_evaluated(Job(out=str(out), settings=settings).resolved(data))
    contamination = measure_halves(data)
    heads: dict[LossSettings, FrozenHead] = {}
    [job] = choose_products([job], data.store, heads, processes)
    [job] = choose_compilation([job], data, contamination, processes)
    run = prepare_run(job, data, identity={}, contamination=contamination, heads=heads)
    warn_about_held_out(contamination)
    run.compile()
    seconds, tokens, targets = _time_steps(run)
    token_s = seconds_per_token(seconds, tokens, skipped=_LEFT_OUT_STEPS)
    lengths, train_half = run.store.sample_lengths, data.split.train
    timed = seconds[_LEFT_OUT_STEPS:] or seconds
    return Preview(
        samples=len(train_half),
        tokens=int(lengths[train_half].sum()),
        targets=contamination.train_targets,
        held_out_samples=len(data.split.held_out),
        held_out_targets=contamination.held_out_targets,
        shared_ratio=contamination.share,
        num_steps=run.num_steps,
        num_parameters=num_parameters(run.carryon),
        device=str(run.head.device),
        head_dtype=job.settings.loss.head_dtype,
        loss_way=job.settings.loss.loss_way,
        compile=run.compiled is not None and run.compiled.is_compiled,
        padded_sizes=job.settings.compilation.padded_sizes,
        compile_s=run.compiled.compile_s if run.compiled is not None else 0.0,
        timed_steps=len(seconds),
        step_s=sum(timed) / len(timed),
        seconds=_all_seconds(run, token_s=token_s, targets=targets),
        memory=_memory(run),
        about=describe(run),
    )


def _time_steps(run: Run) -> tuple[list[float], list[int], Tensor]:
    """Take the first steps; return seconds and tokens of each, and the last targets, [M].

    Seconds hold the wait for the data too.
    """
    seconds, tokens, targets = list[float](), list[int](), torch.empty(0, dtype=torch.long)
    count = min(TIMED_STEPS, run.num_steps)
    stream = Stream(
        run.store,
        run.windows,
        taps=run.taps,
        settings=run.data.settings,
        is_pinned=run.head.device.type == "cuda",
    )
    with stream, Progress(count, name="preview", unit="steps") as progress:
        steps, began = iter(stream), time.perf_counter()
        for step in range(count):
            batches = next(steps)
            taken = run.take_step(batches, rate=run.rate(step), is_read=True)
            seconds.append(time.perf_counter() - began)
            tokens.append(taken.tokens)
            began, targets = time.perf_counter(), batches[0].targets
            progress.update()
    return seconds, tokens, targets


def _all_seconds(run: Run, *, token_s: float, targets: Tensor) -> float:
    """Return the expected seconds of all steps and evaluations; see duration.py.

    Args:
        run: whose first steps were timed.
        token_s: seconds of a step for each token.
        targets: [M] of a step.
    """
    lengths, split, seen = run.store.sample_lengths, run.data.split, run.contamination
    steps = [step for window in run.windows for step in window.steps]
    all_tokens = sum(int(lengths[batch].sum()) for step in steps for batch in step)
    density = seen.train_targets / max(1, int(lengths[split.train].sum()))
    held_out_tokens = int(lengths[split.held_out].sum())
    evaluated_tokens = int(lengths[run.evaluated].sum())
    target_s = evaluation_seconds(
        run.head, targets, chunk=run.chunk, at_most_s=token_s / max(density, 1e-9)
    )
    evaluations = Evaluations(
        left=count_evaluations(
            run.epochs,
            first=0,
            every=run.settings.run.evaluate_every,
            includes_last=run.settings.run.finishes_with_best,
        ),
        base_s=target_s * seen.held_out_targets * evaluated_tokens / max(1, held_out_tokens),
        tokens=evaluated_tokens,
        last_tokens=held_out_tokens,
        last_targets=seen.held_out_targets,
        target_s=target_s,
    )
    return token_s * all_tokens + evaluations.seconds(run.work, token_s=token_s, density=density)


def _memory(run: Run) -> dict[str, int]:
    settings, lengths = run.settings, run.store.sample_lengths
    batches = [batch for window in run.windows for step in window.steps for batch in step]
    train_tokens = int(lengths[run.data.split.train].sum())
    weights = list(run.carryon.parameters())
    sizes = [PaddedSize.parse(each).tokens for each in settings.compilation.padded_sizes]
    case = MemoryCase(
        base_width=run.store.width,
        vocab_size=run.head.vocab_size,
        micro_batch_tokens=max([*sizes, *(int(lengths[batch].sum()) for batch in batches)]),
        supervised_ratio=run.contamination.train_targets / max(1, train_tokens),
        window_tokens=0,
        head_bytes=run.head.dtype.itemsize,
        carryon=_shape(run),
        loss=settings.loss,
        memory=settings.memory,
        weights=[each.numel() for each in weights if each.requires_grad],
        frozen_bytes=sum(each.nbytes for each in weights if not each.requires_grad),
        is_compiled=run.compiled is not None and run.compiled.is_compiled,
    )
    parts = plan_memory(case)
    return parts | {"batches": stream_bytes(run.store, run.windows, taps=run.taps)}


def _shape(run: Run) -> CarryOnSettings:
    """Return the shape of the blocks of a carry-on, which the settings may not hold."""
    shape, width = run.settings.carryon, run.store.width
    if not get_kind(shape.kind).needs_blocks:
        return shape
    largest = max(each.numel() for each in run.carryon.parameters())  # of an MLP, mostly
    inner = min(max(1, largest // width), _MOST_INNER)
    return replace(shape, width=width, heads=1, intermediate_size=inner)
