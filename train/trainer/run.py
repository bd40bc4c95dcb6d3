"""A prepared run: everything that stays the same from its first step to its last."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings, LossSettings, TrainSettings
from carryon.train.data.batch import Batch, no_states
from carryon.train.data.contamination import Contamination
from carryon.train.data.datasets import TrainData
from carryon.train.data.evaluation_set import (
    MAX_RATIO,
    Work,
    choose_evaluated,
    count_evaluations,
    evaluation_ratio,
    first_samples,
)
from carryon.train.data.padding import PaddedSize
from carryon.train.data.sampler import Window, count_steps
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.mixing.mixture import MixedCarryOn, build_gate
from carryon.train.mixing.projected import ProjectedSources, token_bytes
from carryon.train.mixing.sources import Source
from carryon.train.modules.carryon import (
    CarryOn,
    as_carryon,
    build_carryon,
    num_parameters,
    taps_of,
)
from carryon.train.optim.lr_schedule import learning_rate
from carryon.train.optim.optimizer import apply_memory_settings, build_optimizer
from carryon.train.trainer.compilation.carryon import CompiledCarryOn
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.metrics import Callback, Scoring
from carryon.train.trainer.run_dir import RunFolder, run_identity
from carryon.train.trainer.segment import Segment, cut_epochs
from carryon.train.trainer.step import Step, take_step

GATE_RATE = 3e-3
"""Peak learning rate of a gate, whatever that of its carry-on; alone, of the kind `none`, it has
the run's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run to train."""

    out: str
    """The run folder."""
    settings: TrainSettings
    segment: Segment | None = None
    """Steps of the order of the data to take, and the state to start from. None: all, from a new
    carry-on."""
    module: nn.Module | None = None
    """The module to train. None: one of the kind that the settings name."""
    callbacks: Sequence[Callback] = ()
    scoring: Scoring | None = None

    def resolved(self, data: TrainData) -> "Job":
        """Return the job with settings that fit the data and the module; see TrainData.resolve."""
        settings = self.settings
        if self.module is not None:
            shape = getattr(self.module, "settings", None)
            if not isinstance(shape, CarryOnSettings) or shape.kind == "custom":
                shape = replace(settings.carryon, kind="custom")
            as_carryon(self.module, shape).settings = shape
            settings = replace(settings, carryon=shape)
        return replace(self, settings=data.resolve(settings))

    def identity(self, data: TrainData) -> dict[str, Any]:
        """Return what decides the result of a resolved job."""
        config = self.settings.to_flat() | {"window_units": data.settings.window_units}
        if data.mix_fingerprints:
            config["mix_fingerprints"] = list(data.mix_fingerprints)
        if self.segment is not None:
            config |= self.segment.identity()
        if self.module is not None:
            name, size = type(self.module).__qualname__, num_parameters(self.module)
            config["module"] = f"{name} of {size:,} trained values"
        run = self.settings.run
        return run_identity(
            store_fingerprint=data.store.fingerprint,
            config=config,
            is_decided_by_evaluations=run.finishes_with_best or run.patience > 0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the steps of a run use."""

    settings: TrainSettings
    folder: RunFolder
    identity: dict[str, Any]
    """Store and settings that a resumed run must share."""
    data: TrainData
    contamination: Contamination
    epochs: list[list[Window]]
    """The order of every epoch."""
    carryon: CarryOn
    optimizer: torch.optim.Optimizer
    head: FrozenHead
    chunk: int
    """Positions whose logits exist at one time."""
    base: BaseStates | None
    """The base's own states, if the loss compares with them or a gate reads them."""
    projected: ProjectedSources | None
    """Distributions of other bases, which a gate mixes. None: there are none."""
    sources: Sequence[Source]
    """Other bases in the mixture."""
    evaluated: NDArray[np.int64]
    """Held-out samples of an evaluation during the run."""
    evaluation_ratio: float
    """Expected seconds of these evaluations, per second of steps."""
    segment: Segment | None
    callbacks: Sequence[Callback]
    scoring: Scoring | None
    compiled: CompiledCarryOn | None
    """The carry-on as steps compute it once it is compiled. None: as it is."""

    @property
    def taps(self) -> list[str]:
        """Taps to read for a step."""
        base_taps = [] if self.base is None else [self.base.tap]
        return list(dict.fromkeys([*taps_of(self.carryon), *base_taps]))

    @property
    def store(self) -> StoreLike:
        """The store, or several read as one."""
        return self.data.store

    @property
    def saved_dtype(self) -> torch.dtype:
        """Type of the finished weights."""
        return torch.bfloat16 if self.settings.run.saved_dtype == "bfloat16" else torch.float32

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return sum(map(count_steps, self.epochs))

    @property
    def work(self) -> Work:
        """What a step and an evaluation multiply."""
        return _work(self.carryon, self.head, width=self.store.width)

    def take_step(self, batches: Sequence[Batch], *, rate: float, is_read: bool) -> Step:
        """Take a step with the learning rate `rate`, as `take_step` of step.py."""
        return take_step(
            self.carryon,
            self.optimizer,
            batches,
            head=self.head,
            chunk=self.chunk,
            learning_rate=rate,
            grad_clip=self.settings.optimization.grad_clip,
            kl_weight=self.settings.loss.kl_weight,
            base=self.base,
            projected=self.projected,
            correct=self.compiled,
            is_read=is_read,
        )

    def compile(self) -> None:
        """Compile the carry-on of steps, if that was chosen; takes long."""
        if self.compiled is not None:
            self.compiled.compile(no_states(self.store, taps_of(self.carryon)))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        settings = self.settings.optimization
        if self.segment is not None:
            return self.segment.rate(step, settings)
        return learning_rate(step, num_steps=self.num_steps, settings=settings)

    def learns(self) -> bool:
        """Return whether a step has a learning rate: every schedule may end at 0."""
        first = self.segment.first if self.segment else 0
        return any(self.rate(step) > 0 for step in range(first, self.num_steps))

    @property
    def windows(self) -> list[Window]:
        """The order of the whole run."""
        return [window for windows in self.epochs for window in windows]

    def eval_job(self, *, with_base: bool, with_carryon: bool) -> EvalJob:
        """Return what an evaluation of this run measures."""
        return EvalJob(
            carryon=self.carryon if with_carryon else None,
            head=self.head,
            chunk=self.chunk,
            with_base=with_base,
            projected=self.projected,
            token_bytes=self.token_bytes,
        )

    @property
    def token_bytes(self) -> Tensor | None:
        """Bytes of each token of a mixture without a gate, which has them itself."""
        return token_bytes(self.sources) if self.sources and self.projected is None else None


def prepare_run(
    job: Job,
    data: TrainData,
    *,
    identity: dict[str, Any],
    contamination: Contamination,
    heads: dict[LossSettings, FrozenHead],
    projected: ProjectedSources | None = None,
    sources: Sequence[Source] = (),
) -> Run:
    """Plan the order, build the untrained carry-on and load the LM head; nothing is written.

    Args:
        job: with resolved settings.
        data: to train on.
        identity: see `Job.identity`.
        contamination: of the halves of the data.
        heads: of runs prepared before, by their settings; this run's is added.
        projected: distributions of other bases, which a gate mixes. None: there are none.
        sources: other bases in the mixture.

    Raises:
        InputError: the device does not exist.
    """
    settings, segment = job.settings, job.segment
    optimization = settings.optimization
    device = pick_device(settings.run.device)
    if settings.loss not in heads:  # first: it sets what happens to memory that is freed
        heads[settings.loss] = place_training_head(data.store, settings.loss, device=device)
    if job.module is None:
        carryon = build_carryon(
            settings.carryon,
            data.store,
            seed=optimization.seed,
            sources=data.store.source_widths,
        )
    else:
        carryon = as_carryon(job.module, settings.carryon)
    carryon = apply_memory_settings(carryon.to(device), settings.memory)
    gate = None
    if projected is not None:
        is_trained = projected.of_samples(data.split.train, data.store.sample_lengths)
        width, seed = data.store.width, optimization.seed
        gate = build_gate(projected, is_trained, width=width, seed=seed).to(device)
    optimizer = build_optimizer(
        carryon,
        optimization,
        settings.memory,
        gate=gate,
        gate_rate=optimization.learning_rate if settings.carryon.kind == "none" else GATE_RATE,
    )
    needs_base = settings.loss.kl_weight > 0 or gate is not None
    epochs = data.plan(optimization)
    if segment is not None:
        epochs = cut_epochs(epochs, segment.stop)
    plan = _plan_evaluations(
        settings,
        data,
        epochs=epochs,
        first=segment.first if segment else 0,
        contamination=contamination,
        carryon=carryon,
        head=heads[settings.loss],
    )
    return Run(
        settings=settings,
        folder=RunFolder(Path(job.out)),
        identity=identity,
        data=data,
        contamination=contamination,
        epochs=epochs,
        carryon=carryon if gate is None else MixedCarryOn(carryon, gate),
        optimizer=optimizer,
        head=heads[settings.loss],
        chunk=pick_chunk(settings.loss.chunk_tokens),
        base=get_base_states(data.store, device=device) if needs_base else None,
        projected=projected,
        sources=sources,
        evaluated=plan[0],
        evaluation_ratio=plan[1],
        segment=segment,
        callbacks=job.callbacks,
        scoring=job.scoring,
        compiled=_plan_compilation(settings, carryon, heads[settings.loss]),
    )


def _plan_compilation(
    settings: TrainSettings, carryon: CarryOn, head: FrozenHead
) -> CompiledCarryOn | None:
    if settings.compilation.compile is not True:
        return None
    sizes = [PaddedSize.parse(each) for each in settings.compilation.padded_sizes]
    return CompiledCarryOn(carryon, head, sizes)


def _plan_evaluations(
    settings: TrainSettings,
    data: TrainData,
    *,
    epochs: list[list[Window]],
    first: int,
    contamination: Contamination,
    carryon: CarryOn,
    head: FrozenHead,
) -> tuple[NDArray[np.int64], float]:
    """Return the samples to evaluate during the run, and the seconds of it per second of steps."""
    lengths, held_out = data.store.sample_lengths, data.split.held_out
    steps = [step for windows in epochs for window in windows for step in window.steps][first:]
    tokens = sum(int(lengths[batch].sum()) for step in steps for batch in step)
    num_evaluations = count_evaluations(
        epochs,
        first=first,
        every=settings.run.evaluate_every,
        includes_last=settings.run.finishes_with_best,
    )
    work = _work(carryon, head, width=data.store.width)
    per_token = contamination.held_out_targets / int(lengths[held_out].sum())
    density = contamination.train_targets / int(lengths[data.split.train].sum())

    def ratio(samples: NDArray[np.int64]) -> float:
        evaluated = int(lengths[samples].sum())
        return evaluation_ratio(
            work,
            trained=(tokens, tokens * density),
            evaluated=(evaluated, evaluated * per_token),
            num_evaluations=num_evaluations,
        )

    if settings.run.evaluate_tokens:
        given = settings.run.evaluate_tokens
        samples = first_samples(held_out, lengths, max_tokens=given)
    else:
        share = MAX_RATIO / ratio(held_out)
        samples = choose_evaluated(held_out, lengths, targets_per_token=per_token, share=share)
    return samples, ratio(samples)


def _work(carryon: CarryOn, head: FrozenHead, *, width: int) -> Work:
    return Work(
        weights=sum(weight.numel() for weight in carryon.parameters()),
        width=width,
        vocabulary=head.vocab_size,
        trained_rows=head.trained_rows,
    )
