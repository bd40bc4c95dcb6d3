"""Whole training steps: speed against the loss alone, time spent waiting for data, padding.

A step is the carry-on's forward and backward pass, the loss, and the optimizer's update.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from carryon.cache.device import DEFAULT_CHUNK
from carryon.tools.bench.epoch import iter_batches
from carryon.tools.bench.job import Job, in_turn, timed
from carryon.tools.bench.loss import LossInput, in_fastest_way, loss_way, make_loss_input
from carryon.train.config import CarryOnSettings, MemorySettings, OptimizationSettings
from carryon.train.data.batch import Batch
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.step import Step, take_step

STEP_TARGET = 0.8
WAIT_TARGET = 0.02
PADDING_TARGET = 0.03
_SAMPLE_TOKENS = 256


def measure_step(
    job: Job, *, tokens: int = 2048, width: int = 576, vocabulary: int = 49_152, rounds: int = 5
) -> None:
    """Report the speed of a step with every other token supervised, against its loss."""
    given = make_loss_input(positions=tokens, width=width, vocabulary=vocabulary)
    given = replace(given, head=in_fastest_way(given.head, positions=tokens))
    step = make_step(given, given.head)

    def read_step() -> None:
        step(True)

    ways = {
        "loss": timed(loss_way(given), calls=3),
        "step": timed(read_step, calls=3),
    }
    seconds = in_turn(ways, rounds=rounds)
    job.report(
        "step.speed",
        seconds["loss"] / seconds["step"],
        "of the loss's speed",
        at_least=STEP_TARGET,
        seconds=seconds,
        tokens=2 * tokens,
        supervised=tokens,
        dtype=str(given.head.dtype),
    )


def make_step(given: LossInput, head: FrozenHead) -> Callable[[bool], Step]:
    """Return a function that trains a carry-on by a step with every other token supervised.

    It is told whether to read the figures of the step, and returns the step.
    """
    settings = OptimizationSettings()
    positions, width = given.states.shape
    carryon = build_bottleneck(CarryOnSettings(), base_width=width, seed=0).to(head.device)
    optimizer = build_optimizer(carryon, settings, MemorySettings())
    num_tokens = 2 * positions
    lengths = np.full(num_tokens // _SAMPLE_TOKENS, _SAMPLE_TOKENS, dtype=np.int64)
    states = torch.zeros(num_tokens, width, dtype=torch.bfloat16)
    states[::2] = given.states.cpu().bfloat16()
    states[1::2] = states[::2]
    batch = Batch(
        samples=np.arange(len(lengths), dtype=np.int64),
        lengths=lengths,
        states={"final": states},
        tokens=torch.zeros(num_tokens, dtype=torch.int32),
        positions=torch.arange(0, num_tokens, 2),
        targets=given.targets.cpu(),
    )
    batch = batch.pinned() if head.device.type == "cuda" else batch

    def step(is_read: bool) -> Step:
        return take_step(
            carryon,
            optimizer,
            [batch],
            head=head,
            chunk=DEFAULT_CHUNK,
            learning_rate=1e-4,
            grad_clip=settings.grad_clip,
            is_read=is_read,
        )

    return step


def measure_data_wait(job: Job) -> None:
    """Report the share of an epoch spent waiting for data, with files in the page cache."""
    from carryon.train.trainer.metrics import read_metrics
    from carryon.train.trainer.trainer import train

    out = job.work / "run"
    train(job.open_store().root, out=out, epochs=1, evaluate_tokens=2048)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "data_wait_ratio" in line]
    shares = [float(line["data_wait_ratio"]) for line in lines]
    job.report(
        "data_wait.share",
        float(np.mean(shares)),
        "of the time of steps",
        at_most=WAIT_TARGET,
        largest=max(shares),
        tokens_per_second=float(np.median([line["tokens_per_second"] for line in lines])),
    )


def measure_padding(job: Job) -> None:
    """Report the share of computed rows that are padding."""
    rows = tokens = spread = 0
    for batch in iter_batches(job.open_store(), taps=["final"]):
        packing = batch.packing()
        rows += len(batch.states["final"])
        tokens += batch.num_tokens
        spread += packing.num_rows * packing.longest
    job.report(
        "padding.share",
        1 - tokens / rows,
        "of the rows computed",
        at_most=PADDING_TARGET,
        tokens=tokens,
        of_attention_alone=1 - tokens / spread,
    )
