"""Whole training steps: against the frozen-head loss alone, and what waits and pads cost.

A step is the carry-on forward and backward, the loss, and the optimizer's move.
"""

import numpy as np
import torch

from carryon.cache.device import DEFAULT_CHUNK
from carryon.tools.bench.loss import loss_way, make_up_loss, timed
from carryon.tools.bench.train import TrainJob
from carryon.tools.compare.figure import Figure, in_turn
from carryon.train.config import (
    CarryOnSettings,
    MemorySettings,
    OptimizationSettings,
    StreamSettings,
)
from carryon.train.data.batch import Batch
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.step import take_step

STEP_TARGET = 0.8
WAIT_TARGET = 0.02
PADDING_TARGET = 0.03
_SAMPLE_TOKENS = 256


def measure_step(job: TrainJob) -> None:
    """Report the speed of a step of which every other token is supervised, against its loss."""
    sizes = job.sizes
    given = make_up_loss(
        positions=sizes.loss_tokens, width=sizes.loss_width, vocabulary=sizes.loss_vocabulary
    )
    settings = OptimizationSettings()
    carryon = build_bottleneck(CarryOnSettings(), base_width=sizes.loss_width, seed=0)
    carryon = carryon.to(given.head.device)
    optimizer = build_optimizer(carryon, settings, MemorySettings())
    num_tokens = 2 * sizes.loss_tokens
    lengths = np.full(num_tokens // _SAMPLE_TOKENS, _SAMPLE_TOKENS, dtype=np.int64)
    states = torch.zeros(num_tokens, sizes.loss_width, dtype=torch.bfloat16)
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

    def step() -> None:
        take_step(
            carryon,
            optimizer,
            [batch],
            head=given.head,
            chunk=DEFAULT_CHUNK,
            learning_rate=1e-4,
            grad_clip=settings.grad_clip,
        )

    ways = {"loss": timed(loss_way(given)), "step": timed(step)}
    seconds = in_turn(ways, rounds=sizes.rounds)
    job.report(
        Figure(
            figure="step.speed",
            value=seconds["loss"] / seconds["step"],
            unit="of the loss's speed",
            target=STEP_TARGET,
            sense="at least",
            details={
                "seconds": seconds,
                "tokens": num_tokens,
                "supervised": sizes.loss_tokens,
                "dtype": str(given.head.dtype),
            },
        )
    )


def measure_data_wait(job: TrainJob) -> None:
    """Report the share of an epoch's time that its steps waited for data, the files being warm."""
    from carryon.train.trainer.metrics import read_metrics
    from carryon.train.trainer.trainer import train

    out = job.work / "run"
    train(job.settings.store, out=out, epochs=1, evaluate_tokens=2048)
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "data_wait_ratio" in line]
    shares = [float(line["data_wait_ratio"]) for line in lines]
    job.report(
        Figure(
            figure="data_wait.share",
            value=float(np.mean(shares)),
            unit="of the time of steps",
            target=WAIT_TARGET,
            details={
                "largest": max(shares),
                "tokens_per_second": float(
                    np.median([line["tokens_per_second"] for line in lines])
                ),
            },
        )
    )


def measure_padding(job: TrainJob) -> None:
    """Report the share of rows that steps compute and that are no token of a sample."""
    from carryon.train.data.datasets import open_data
    from carryon.train.data.loader import Stream

    data = open_data([job.settings.store], StreamSettings(), taps=["final"])
    [windows] = data.plan(OptimizationSettings(epochs=1))
    rows = tokens = spread = 0
    stream = Stream(data.store, windows, taps=["final"], settings=data.settings, is_pinned=False)
    with stream as steps:
        for batch in (batch for batches in steps for batch in batches):
            packing = batch.packing()
            rows += len(batch.states["final"])
            tokens += batch.num_tokens
            spread += packing.num_rows * packing.longest
    job.report(
        Figure(
            figure="padding.share",
            value=1 - tokens / rows,
            unit="of the rows computed",
            target=PADDING_TARGET,
            details={"tokens": tokens, "of_attention_alone": 1 - tokens / spread},
        )
    )
