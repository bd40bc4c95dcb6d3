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
from functools import partial
from types import FrameType

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress
from carryon.train.data.datasets import TrainData
from carryon.train.data.evaluation_set import choose_evaluated
from carryon.train.data.joint_sampler import JointOrder, join_orders
from carryon.train.data.loader import Stream, stream_bytes
from carryon.train.losses.endings import MIN_ANSWERS, Endings
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.nll import EvalJob, measure_nlls
from carryon.train.trainer.run import Run
from carryon.train.trainer.run_state import RunState

logger = logging.getLogger(__name__)


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
                line = state.take_step(batches, wait_s=wait_s)
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
