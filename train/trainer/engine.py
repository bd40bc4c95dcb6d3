"""Take the steps of several runs from one read of the data.

Each window is read once, and every run takes its own steps of it. An evaluation waits until one of
the runs that need it takes its next step: runs at the same place then share one read of the
held-out samples.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType

import numpy as np

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress, show_seconds
from carryon.train.data.batch import Batch
from carryon.train.data.datasets import TrainData
from carryon.train.data.duration import Evaluations, awaited_steps, seconds_per_token
from carryon.train.data.evaluation_set import choose_evaluated, count_evaluations
from carryon.train.data.joint_sampler import JointOrder, join_orders
from carryon.train.data.loader import Stream, stream_bytes
from carryon.train.losses.endings import MIN_ANSWERS, Endings
from carryon.train.losses.sampled_gain import (
    NUM_SAMPLED,
    evaluation_seconds,
    expected_rows,
    time_losses,
)
from carryon.train.trainer.checkpoint import Progress as Position
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import measure_nlls
from carryon.train.trainer.run import Run
from carryon.train.trainer.run_state import RunState

logger = logging.getLogger(__name__)

HINT_S = 20.0
"""Seconds of a run's steps from which a faster loss is worth a line."""
HINT_RATIO = 2.0
"""Times that the run must be faster."""
MOST_LOSS = 0.9
"""Highest part of a step that is taken for the loss: apart, and of few positions, it takes longer
than in a step, and nothing would be left for the carry-on."""


def measure_base(states: Sequence[RunState]) -> None:
    """Measure the base for new runs: an untrained carry-on is the base."""
    lines = []
    for group in _by_samples(states):
        run, endings, started_at = group[0].run, Endings(), time.perf_counter()
        jobs = [state.run.eval_job(with_base=True, with_carryon=False) for state in group]
        nlls = measure_nlls(
            run.store, run.evaluated, jobs, stream=run.data.settings, endings=endings, is_rough=True
        )
        total = partial(sum_over_processes, device=run.head.device)
        _add_endings(run, jobs[:1], endings, total=total)
        seconds = (time.perf_counter() - started_at) / len(group)
        for state, nll in zip(group, nlls, strict=True):
            state.record_baseline(nll, seconds=seconds)
        lines.append(endings.warning(run.store, total=total))
    if lines and lines[0]:  # the samples of several groups differ only in their number
        logger.warning(lines[0])


def _add_endings(
    run: Run, jobs: Sequence[EvalJob], endings: Endings, *, total: Callable[..., list[float]]
) -> None:
    """Measure answers of the training half too, if the held-out ones are too few for a warning."""
    [count] = total(endings.sums[0])
    if not 0 < count < MIN_ANSWERS:
        return
    train_half, lengths = run.data.split.train, run.store.sample_lengths
    samples = choose_evaluated(train_half, lengths, targets_per_token=1.0, share=0.0)
    measure_nlls(run.store, samples, jobs, stream=run.data.settings, endings=endings, is_rough=True)


def run_engine(
    data: TrainData, states: Sequence[RunState], processes: Processes, stop: threading.Event
) -> None:
    """Take the steps that are left, in their joint order.

    Raises:
        KeyboardInterrupt: `stop` was set; every run has a checkpoint.
        Exception: of a callback; every run has a checkpoint.
    """
    order = join_orders(
        [state.run.windows for state in states],
        [state.run.num_steps if state.is_done else state.progress.step for state in states],
        rank=processes.rank,
        world_size=processes.size,
    )
    if not order.steps:
        return
    for state in states:
        if not state.is_done:
            state.run.compile()
    taps = list(dict.fromkeys(tap for state in states for tap in state.run.taps))
    if len(states) > 1:
        _check_memory(data, order, taps)
    device = states[0].run.head.device
    total = sum(len(step.runs) for step in order.steps)
    stream = Stream(
        data.store,
        order.windows,
        taps=taps,
        settings=data.settings,
        is_pinned=device.type == "cuda",
    )
    forecast = _Forecast(states if processes.is_first else [], num_processes=processes.size)
    with stream, Progress(total, name="train", unit="steps") as progress:
        steps = iter(stream)
        for step in order.steps:
            waited_s = stream.wait_s
            batches = next(steps) if step.has_rows else []
            wait_s = (stream.wait_s - waited_s) / len(step.runs)
            takers = [states[run] for run in step.runs]
            if any(state.awaits_evaluation for state in takers):
                _evaluate(states)
            for state in takers:
                if state.is_done:
                    continue
                before = state.progress
                line = state.take_step(batches, wait_s=wait_s)
                forecast.add(state, batches, before, is_read=line is not None)
                if line is not None:
                    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                    progress.note = f"loss {line['loss']:.4f}, {speed}"
                progress.update()
            batches = []  # given back before the next window's memory is taken
            is_stopped = stop.is_set() or any(state.error for state in states)
            if sum_over_processes(is_stopped, device=device) != [0]:
                _stop(states)
            if all(state.is_done for state in states):
                break
        _evaluate(states)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once.

    Outside the main thread, which alone can catch signals, they act as before.
    """
    stop = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    before = {number: signal.signal(number, notice) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_callback_errors(states: Sequence[RunState]) -> None:
    """Raise the first exception of a callback, if there is one."""
    for state in states:
        if state.error is not None:
            raise state.error


def _evaluate(states: Sequence[RunState]) -> None:
    """Evaluate the runs that wait for it, those on the same samples in one pass."""
    for group in _by_samples([state for state in states if state.awaits_evaluation]):
        run, started_at = group[0].run, time.perf_counter()
        jobs = [state.run.eval_job(with_base=False, with_carryon=True) for state in group]
        nlls = measure_nlls(run.store, run.evaluated, jobs, stream=run.data.settings, is_rough=True)
        seconds = (time.perf_counter() - started_at) / len(group)
        for state, nll in zip(group, nlls, strict=True):
            state.record_evaluation(nll, seconds=seconds)


def _by_samples(states: Sequence[RunState]) -> list[list[RunState]]:
    groups: dict[bytes, list[RunState]] = {}
    for state in states:
        groups.setdefault(state.run.evaluated.tobytes(), []).append(state)
    return list(groups.values())


def _stop(states: Sequence[RunState]) -> None:
    _evaluate(states)
    for state in states:
        state.save()
    raise_callback_errors(states)
    steps = ", ".join(f"{state.progress.step} of {state.run.num_steps}" for state in states)
    raise KeyboardInterrupt(
        f"stopped after step {steps}; a checkpoint is saved. Run the same command to resume"
    )


def _check_memory(data: TrainData, order: JointOrder, taps: Sequence[str]) -> None:
    # One run fits by its window_units; several may want a window in several orders, or more taps.
    needed, limit = stream_bytes(data.store, order.windows, taps=taps), data.settings.host_memory_gb
    if needed > limit * 1e9:
        raise InputError(
            f"host_memory_gb: expected {needed / 1e9:.2g} or more for these runs together, got "
            f"{limit:g}. Fix: raise --host-memory-gb, or lower --window-units"
        )


@dataclass(slots=True)
class _Timed:
    """The first steps of a run in this session."""

    start: Position
    awaited: int
    """Steps to time."""
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_read: bool = False
    """Whether the seconds hold all work of these steps: an accelerator is waited for now and then.
    """

    @property
    def is_done(self) -> bool:
        return len(self.seconds) >= self.awaited and self.is_read


class _Forecast:
    """Says in the log how long runs take, once, after the first steps of all of them."""

    def __init__(self, states: Sequence[RunState], *, num_processes: int) -> None:
        """Begin before the first step; of several processes one has the states."""
        self._num_processes = num_processes
        self._timed: dict[int, _Timed] = {}
        self._states: list[RunState] = []
        for state in states:
            if awaited := awaited_steps(state.run.num_steps - state.progress.step):
                self._timed[id(state)] = _Timed(start=state.progress, awaited=awaited)
                self._states.append(state)

    def add(
        self, state: RunState, batches: Sequence[Batch], before: Position, *, is_read: bool
    ) -> None:
        """Count a step that a run has taken from `before`.

        `is_read` says whether an accelerator has been waited for after it.
        """
        timed = self._timed.get(id(state))
        if timed is None or timed.is_done:
            return
        timed.is_read = is_read or state.run.head.device.type == "cpu"
        timed.seconds.append(state.progress.elapsed_s - before.elapsed_s)
        timed.tokens.append(state.progress.tokens - before.tokens)
        if not batches or not all(self._timed[id(each)].is_done for each in self._states):
            return
        self._say_duration(batches[0])
        if not self._is_resumed:
            self._say_gain(self._states[0], batches[0])
        self._timed = {}

    @property
    def _is_resumed(self) -> bool:
        """Whether a run was begun before: what it would gain has been said."""
        return any(self._timed[id(each)].start.step > _first(each.run) for each in self._states)

    def _say_duration(self, batch: Batch) -> None:
        steps_s = sum(self._steps_left_s(state) for state in self._states)
        evaluations_s = sum(self._evaluations_s(state, batch) for state in self._states)
        left_s = steps_s + evaluations_s
        left = sum(state.run.num_steps - state.progress.step for state in self._states)
        steps, tail = sum(each.run.num_steps - _first(each.run) for each in self._states), ""
        if self._is_resumed:
            steps, tail = left, " that are left"
        else:
            for state in self._states:
                left_s += state.progress.elapsed_s + state.progress.evaluate_s
        runs = f"{len(self._states)} runs" if len(self._states) > 1 else _name(self._states[0])
        included = ", evaluations included" if evaluations_s else ""
        logger.info(f"{runs}: about {show_seconds(left_s)} for {steps:,} steps{tail}{included}")

    def _steps_left_s(self, state: RunState) -> float:
        return self._token_s(state) * _tokens_left(state)

    def _token_s(self, state: RunState) -> float:
        timed, is_cpu = self._timed[id(state)], state.run.head.device.type == "cpu"
        return seconds_per_token(timed.seconds, timed.tokens, skipped=int(is_cpu))

    def _batch_s(self, state: RunState, batch: Batch) -> float:
        """Return the seconds of a step with such a batch in each process."""
        return self._token_s(state) * batch.num_tokens * self._num_processes

    def _evaluations_s(self, state: RunState, batch: Batch) -> float:
        run, progress = state.run, state.progress
        count = partial(
            count_evaluations,
            run.epochs,
            every=run.settings.run.evaluate_every,
            includes_last=run.settings.run.finishes_with_best,
        )
        left = count(first=progress.step) - 1 + state.awaits_evaluation
        done = max(1, count(first=_first(run)) - left)
        if not progress.evaluate_s or not batch.num_targets:
            return 0.0
        lengths, token_s = run.store.sample_lengths, self._token_s(state)
        target_s = evaluation_seconds(
            run.head,
            batch.targets,
            chunk=run.chunk,
            at_most_s=self._batch_s(state, batch) / batch.num_targets,
        )
        evaluations = Evaluations(
            left=left,
            base_s=progress.evaluate_s / done,
            tokens=int(lengths[run.evaluated].sum()),
            last_tokens=int(lengths[run.data.split.held_out].sum()),
            last_targets=run.contamination.held_out_targets,
            target_s=target_s / self._num_processes,
        )
        return evaluations.seconds(run.work, token_s=token_s, density=_density(state))

    def _say_gain(self, state: RunState, batch: Batch) -> None:
        """Say what a sampled softmax would do to the time of a run, where it is dear without."""
        run, loss = state.run, state.run.settings.loss
        takes_all = loss.sampled_softmax or loss.kl_weight or loss.gradient_filter or run.projected
        token_s = self._token_s(state)
        exact_s = token_s * (state.progress.tokens + _tokens_left(state))
        if takes_all or not batch.num_targets or exact_s < HINT_S:
            return
        work, density = run.work, _density(state)
        few = replace(work, trained_rows=expected_rows(work.vocabulary))
        if work.of_training(1, density) < HINT_RATIO * few.of_training(1, density):
            return
        of_batch = self._batch_s(state, batch)
        timed = time_losses(
            run.head,
            run.store,
            batch.targets,
            chunk=run.chunk,
            at_most_s=of_batch / batch.num_targets,
        )
        ratio = min(MOST_LOSS, timed.exact / of_batch)
        sampled_s = exact_s * (1 - ratio + timed.sampled / of_batch)
        if exact_s < HINT_RATIO * sampled_s:
            return
        logger.info(
            f"{_name(state)}: the exact loss over {work.vocabulary:,} tokens takes "
            f"{ratio:.0%} of a step: about {show_seconds(exact_s)} of "
            f"steps; with --sampled-softmax {NUM_SAMPLED} they would take about "
            f"{show_seconds(sampled_s)}. Training losses are then estimates, held-out losses are "
            "over the whole vocabulary"
        )


def _name(state: RunState) -> str:
    return str(state.run.folder.root)


def _first(run: Run) -> int:
    """Return the step with which a run begins."""
    return run.segment.first if run.segment else 0


def _density(state: RunState) -> float:
    return state.progress.targets / max(1, state.progress.tokens)


def _tokens_left(state: RunState) -> int:
    lengths = state.run.store.sample_lengths
    steps = [step for window in state.run.windows for step in window.steps]
    left = [batch for step in steps[state.progress.step :] for batch in step]
    return int(lengths[np.concatenate(left)].sum(dtype=np.int64)) if left else 0
