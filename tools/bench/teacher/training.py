"""A plain training loop in float32: the student's carry-on with a teacher or without.

Equal seeds have equal weights at the start, and see the same samples in the same order.
"""

import math
import time
from typing import Any

import torch
from torch import nn

from carryon.cache.errors import InputError
from carryon.tools.bench.teacher.log_probs import LogProbFile
from carryon.tools.bench.teacher.loss import backpropagate
from carryon.train.config import MemorySettings, TrainSettings
from carryon.train.data.datasets import TrainData
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.projected import rows_of
from carryon.train.modules.carryon import CarryOn, build_carryon, taps_of
from carryon.train.optim.lr_schedule import learning_rate
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import measure_nlls
from carryon.train.trainer.step import pair_delta

_EVALUATED_CHUNK = 512


def train_student(
    data: TrainData,
    settings: TrainSettings,
    *,
    head: FrozenHead,
    teacher: LogProbFile | None,
    weight: float,
    temperature: float,
) -> dict[str, Any]:
    """Train one carry-on, and return its held-out losses and the best of them.

    Args:
        data: of the student.
        settings: resolved: of carry-on and optimization; `evaluate_every` as in carryon train.
        head: of the student, in float32.
        teacher: None: there is none.
        weight: of the teacher.
        temperature: of the distance from it.

    Raises:
        InputError: the held-out loss is not finite.
    """
    started_at, optimization = time.perf_counter(), settings.optimization
    epochs = data.plan(optimization)
    ends = torch.tensor([count_steps(epoch) for epoch in epochs]).cumsum(0).tolist()
    every = settings.run.evaluate_every
    evaluated = {*range(every, ends[-1], every), ends[-1]} if every else set(ends)
    torch.manual_seed(optimization.seed)  # of dropout
    carryon = build_carryon(settings.carryon, data.store, seed=optimization.seed).to(head.device)
    optimizer = build_optimizer(carryon, optimization, MemorySettings())
    limit = optimization.grad_clip or math.inf
    reader = Stream(
        data.store,
        [window for epoch in epochs for window in epoch],
        taps=taps_of(carryon),
        settings=data.settings,
        is_pinned=False,
    )
    held_out: list[dict[str, float]] = []
    with reader as steps:
        for step, batches in enumerate(steps, 1):
            num_targets = max(1, sum(batch.num_targets for batch in batches))
            entropy = distance = 0.0
            for batch in (each.to(head.device) for each in batches):
                delta = pair_delta(carryon, batch, head=head)
                rows = rows_of(batch, data.store.sample_starts)
                sums = backpropagate(
                    carryon.customize(batch.states, batch.positions, delta, alpha=1.0),
                    batch.targets,
                    teacher.picked(rows) if teacher else None,
                    head=head,
                    weight=weight,
                    temperature=temperature,
                    divisor=num_targets,
                )
                entropy, distance = entropy + sums[0], distance + sums[1]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, num_steps=ends[-1], settings=optimization)
            nn.utils.clip_grad_norm_(carryon.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step in evaluated:
                line = {"step": step, "held_out_nll": _held_out_nll(data, carryon, head)}
                line |= {"step_nll": entropy / num_targets, "step_kl": distance / num_targets}
                held_out.append(line)
    best = min(held_out, key=lambda each: each["held_out_nll"])
    return {
        "evaluations": held_out,
        "best_step": best["step"],
        "best_nll": best["held_out_nll"],
        "last_step": ends[-1],
        "last_nll": held_out[-1]["held_out_nll"],
        "seconds": time.perf_counter() - started_at,
    }


def _held_out_nll(data: TrainData, carryon: CarryOn, head: FrozenHead) -> float:
    job = EvalJob(carryon=carryon, head=head, chunk=_EVALUATED_CHUNK)
    [nll] = measure_nlls(data.store, data.split.held_out, [job], stream=data.settings)
    if not math.isfinite(nll.carryon):
        raise InputError(
            f"learning_rate: expected a finite held-out loss, got {nll.carryon}. Fix: a lower one"
        )
    return nll.carryon
