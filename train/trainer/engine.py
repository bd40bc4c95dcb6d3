"""Driving runs: each window of the data is read once, and every run takes its own steps of it.

Evaluations are put off until one of the runs concerned is to go on, so that those which fall
together share one read of the held-out samples.
"""

from collections.abc import Sequence

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress
from carryon.train.data.datasets import TrainData
from carryon.train.data.joint_sampler import JointOrder, join_orders
from carryon.train.data.loader import Stream, stream_bytes
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.interrupt import StopRequest
from carryon.train.trainer.nll import measure_nlls
from carryon.train.trainer.run_state import RunState


def measure_base(lives: Sequence[RunState]) -> None:
    """Measure the base for runs that begin: an untrained carry-on is the base."""
    for group in _by_samples(lives):
        run = group[0].run
        jobs = [live.run.eval_job(with_base=True, with_carryon=False) for live in group]
        nlls = measure_nlls(run.store, run.sampled, jobs, stream=run.data.settings)
        for live, nll in zip(group, nlls, strict=True):
            live.record_baseline(nll)


def _evaluate(lives: Sequence[RunState]) -> None:
    """Evaluate the runs that wait for it, those on the same samples in one pass."""
    for group in _by_samples([live for live in lives if live.awaits_evaluation]):
        run = group[0].run
        jobs = [live.run.eval_job(with_base=False, with_carryon=True) for live in group]
        nlls = measure_nlls(run.store, run.sampled, jobs, stream=run.data.settings)
        for live, nll in zip(group, nlls, strict=True):
            live.record_evaluation(nll)


def _by_samples(lives: Sequence[RunState]) -> list[list[RunState]]:
    groups: dict[int, list[RunState]] = {}
    for live in lives:
        groups.setdefault(live.run.settings.run.evaluate_tokens, []).append(live)
    return list(groups.values())


def run_engine(
    data: TrainData, lives: Sequence[RunState], processes: Processes, stop: StopRequest
) -> None:
    """Take the steps that are left, in their joint order."""
    order = join_orders(
        [live.run.windows for live in lives],
        [live.run.num_steps if live.is_done else live.progress.step for live in lives],
        rank=processes.rank,
        world_size=processes.size,
    )
    if not order.steps:
        return
    taps = _taps(lives)
    if len(lives) > 1:
        _check_memory(data, order, taps)
    device = lives[0].run.head.device
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
            takers = [lives[run] for run in step.runs]
            if any(live.awaits_evaluation for live in takers):
                _evaluate(lives)
            for live in takers:
                if live.is_done:
                    continue
                line = live.take_step(batches, wait_s=wait_s)
                if line is not None:
                    speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                    progress.note = f"loss {line['loss']:.4f}, {speed}"
                progress.update()
            batches = []  # given back before the next window's memory is taken
            [stops] = sum_over_processes(stop.is_set, device=device)
            if stops:
                _stop(lives)
            if all(live.is_done for live in lives):
                break
        _evaluate(lives)


def _stop(lives: Sequence[RunState]) -> None:
    _evaluate(lives)
    for live in lives:
        live.save()
    steps = ", ".join(f"{live.progress.step} of {live.run.num_steps}" for live in lives)
    raise KeyboardInterrupt(
        f"stopped after step {steps}, a checkpoint is written: run the same command to go on"
    )


def _taps(lives: Sequence[RunState]) -> list[str]:
    return list(dict.fromkeys(tap for live in lives for tap in live.run.taps))


def _check_memory(data: TrainData, order: JointOrder, taps: Sequence[str]) -> None:
    # One run fits by its window_units; several may want a window in several orders, or more taps.
    needed, limit = stream_bytes(data.store, order.windows, taps=taps), data.settings.host_memory_gb
    if needed > limit * 1e9:
        raise InputError(
            f"host_memory_gb: expected {needed / 1e9:.2g} or more for these runs together, got "
            f"{limit:g}: give that much, or fewer window_units"
        )
