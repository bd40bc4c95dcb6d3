"""One row of `carryon compare`: a method trained against the clock.

The clock counts extraction, where the run has one, reading, and steps of training. It stands still
while something is evaluated, loaded or rehearsed. The learning rate is a function of the part of
the training time that has passed, so that it falls to its end when the budget does, however fast
the machine is. A row is killed or whole: its file is written last.
"""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryon.cache.base.model import Base, load_base
from carryon.cache.extraction.pipeline import run_extraction
from carryon.cache.files import write_file, write_json
from carryon.cache.progress import Progress
from carryon.cache.settings import ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.cli.logs import log_to_stderr
from carryon.tools.compare.data import (
    Material,
    corpus_settings,
    iter_steps,
    prepare_material,
)
from carryon.tools.compare.methods import (
    Learner,
    Reader,
    build_learner,
    read_samples,
    read_store,
    read_taps,
)
from carryon.tools.compare.peak_memory import anonymous_bytes, watched_peak
from carryon.tools.compare.settings import CompareSettings, Method, Row, get_methods
from carryon.train.config import MemorySettings, OptimizationSettings
from carryon.train.optim.lr_schedule import learning_rate
from carryon.train.optim.optimizer import build_optimizer

UNIT_TOKENS = 4096
"""Small units: a chunk is decoded for each sample in it."""
PROSE_PASSES, ANSWER_PASSES = 3.0, 12.0
"""Of cheap methods: in five minutes ten passes over manual pages ended 0.8 nats above the base, and
four over worked problems 0.11 above what eight came to."""
_PILOT_TOKENS = 4096
_PILOT_STEPS = 3
_PARTS = 1000  # of the training time, as steps of the schedule
_EVALUATE_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What all rows of a comparison share."""

    settings: CompareSettings
    base: str
    out: Path
    material: Material
    method: Method


def main(request: dict[str, Any]) -> None:
    """Make the row of a request and write its file; for a fresh process."""
    before = anonymous_bytes()
    settings, row = CompareSettings(**request["settings"]), Row(**request["row"])
    out, base = Path(request["out"]), request["base"]
    methods = get_methods(settings, num_layers=request["num_layers"], width=request["width"])
    bench = Bench(
        settings=settings,
        base=base,
        out=out,
        material=prepare_material(settings, base=base, out=out),
        method=methods[row.method],
    )
    rate = row.learning_rate or request["learning_rate"]
    document = run_row(bench, row, rate=rate, before=before)
    document["command"] = request["command"]
    write_json(out / "rows" / f"{row.name}.json", document)


def run_row(bench: Bench, row: Row, *, rate: float, before: int) -> dict[str, Any]:
    """Train a method as the row says; return what was measured.

    Args:
        bench: what is compared.
        row: which.
        rate: highest learning rate.
        before: anonymous memory of the process before anything was loaded.
    """
    method, material = bench.method, bench.material
    extraction: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
    store = judged = None
    num_samples = len(material.train)
    if method.is_carryon:
        judged = _held_out_store(bench)
        if row.run == "first":
            store, extraction = _first_store(bench, row)
        else:
            store, extraction = _shared_store(bench)
        num_samples = store.num_samples
    counted_s = extraction["seconds"] if row.run == "first" else 0.0
    with watched_peak() as peak:
        learner = _build(bench, store, seed=row.seed)
        if store is None or judged is None:
            readers = read_samples(material.train), read_samples(material.held_out)
        else:
            taps = read_taps(method)
            readers = (
                read_store(store, material.train, taps),
                read_store(judged, material.held_out, taps),
            )
        found = _train(
            bench, row, learner, *readers, num_samples=num_samples, rate=rate, spent_s=counted_s
        )
    if row.run == "first" and store is not None:
        shutil.rmtree(store.root)
    return {
        **asdict(row),
        **found,
        "learning_rate": rate,
        "extraction": extraction,
        "trainable_bytes": learner.trainable_bytes,
        "ship_bytes": learner.ship_bytes,
        "peak_bytes": peak.bytes - before,
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "data": bench.material.facts,
        "tokens_per_step": bench.settings.tokens_per_step,
        "sampled_softmax": bench.settings.sampled_softmax,
    }


def _build(bench: Bench, store: Store | None, *, seed: int) -> Learner:
    return build_learner(
        bench.method,
        base=bench.base,
        store=store,
        seed=seed,
        samples=bench.material.train,
        sampled_softmax=bench.settings.sampled_softmax,
    )


def _train(
    bench: Bench,
    row: Row,
    learner: Learner,
    read: Reader,
    read_held_out: Reader,
    *,
    num_samples: int,
    rate: float,
    spent_s: float,
) -> dict[str, Any]:
    """Train until the budget ends; return the curve, and what the run came to."""
    optimization = OptimizationSettings(learning_rate=rate, warmup_ratio=0.05, seed=row.seed)
    optimizer = build_optimizer(learner.model, optimization, MemorySettings())  # type: ignore[arg-type]
    train, budget_s = bench.material.train, max(1e-9, row.seconds - spent_s)
    steps = iter_steps(
        train, num_samples, seed=row.seed, tokens_per_step=bench.settings.tokens_per_step
    )
    start = _known_start(bench)
    curve = [start or _evaluation(bench, learner, read_held_out, clock_s=0.0, tokens=0, steps=0)]
    points = sorted(at for at in bench.settings.evaluate_at if spent_s < at < row.seconds)
    losses: list[float] = []
    took: list[float] = []
    clock_s, tokens, epoch = 0.0, 0, 0
    torch.manual_seed(row.seed)
    with Progress(row.seconds, name=row.name, unit="s") as progress:
        progress.update(spent_s)
        while not took or clock_s + 0.5 * float(np.median(took)) < budget_s:
            started_at = time.perf_counter()
            epoch, chosen = next(steps)
            middle_s = clock_s + (0.5 * took[-1] if took else 0.0)
            part = min(_PARTS - 1, int(_PARTS * middle_s / budget_s))
            now = learning_rate(part, num_steps=_PARTS, settings=optimization)
            losses.append(_step(learner, optimizer, read(chosen), rate=now))
            took.append(time.perf_counter() - started_at)
            clock_s += took[-1]
            tokens += sum(len(train[index].tokens) for index in chosen.tolist())
            progress.note = f"loss {losses[-1]:.3f}"
            progress.update(took[-1])
            while points and spent_s + clock_s >= points[0]:
                points.pop(0)
                at = spent_s + clock_s
                curve.append(
                    _evaluation(
                        bench, learner, read_held_out, clock_s=at, tokens=tokens, steps=len(took)
                    )
                )
    at = spent_s + clock_s
    curve.append(
        _evaluation(bench, learner, read_held_out, clock_s=at, tokens=tokens, steps=len(took))
    )
    return {
        "curve": curve,
        "nll": curve[-1]["nll"],
        "base_nll": curve[0]["nll"],
        "train_s": clock_s,
        "tokens": tokens,
        "steps": len(took),
        "epochs": epoch + 1,
        "tokens_per_second": tokens / clock_s,
        "losses": losses,
    }


def _step(learner: Learner, optimizer: torch.optim.Optimizer, batch: Any, *, rate: float) -> float:  # noqa: ANN401
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = learner.losses(batch).mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(learner.weights, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())  # a waiting point: the clock is read after it


def _evaluation(
    bench: Bench, learner: Learner, read: Reader, *, clock_s: float, tokens: int, steps: int
) -> dict[str, Any]:
    """Measure the mean NLL of the clean held-out targets; the same sums for every method."""
    samples = bench.material.held_out
    total, targets = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(samples), 4):
            batch = read(np.arange(first, min(first + 4, len(samples))))
            total += float(learner.losses(batch).double().sum())
            targets += batch.num_targets
    return {"clock_s": clock_s, "tokens": tokens, "steps": steps, "nll": total / targets}


def _known_start(bench: Bench) -> dict[str, Any] | None:
    """Return the evaluation with which another row of the method began, if there is one."""
    for path in (bench.out / "rows").glob(f"{bench.method.name}-*.json"):
        row = json.loads(path.read_text())
        if row["method"] == bench.method.name:
            found: dict[str, Any] = row["curve"][0]
            return found
    return None


def _first_store(bench: Bench, row: Row) -> tuple[Store, dict[str, Any]]:
    """Extract, against the clock, what the run is going to read.

    Half of it first, so that what the other half may take is known from how fast this went.
    """
    base = load_base(bench.base, forward=ForwardSettings())
    speeds = _rehearse(bench, base)
    reading_s = plan_passes(bench) / speeds["train"]
    a_token_s = 1 / speeds["extract"] + reading_s
    wanted = max(0.0, row.seconds - speeds["fixed_s"]) / a_token_s
    root = bench.out / "work" / row.name
    shutil.rmtree(root, ignore_errors=True)
    number = bench.material.count_samples(int(wanted / 2))
    started_at = time.perf_counter()
    forward_s = _extract(bench, base, _samples_file(bench, row, range(number)), root)
    seconds = time.perf_counter() - started_at
    tokens = Store.open(root).num_tokens
    a_token_s = forward_s / tokens
    wanted = (row.seconds - seconds + tokens * a_token_s) / (a_token_s + reading_s)
    more = range(number, bench.material.count_samples(int(wanted)))
    if len(more) > 0:
        _extract(bench, base, _samples_file(bench, row, more), root, append=True)
        seconds = time.perf_counter() - started_at
    store = Store.open(root)
    return store, {"seconds": seconds, "tokens": store.num_tokens, **speeds}


def plan_passes(bench: Bench) -> float:
    """Return how often a first run is to read what it extracts: as told, or as the text wants."""
    if bench.method.passes is not None:
        return bench.method.passes
    is_prose = all(bool(sample.loss_mask[1:].all()) for sample in bench.material.train)
    return PROSE_PASSES if is_prose else ANSWER_PASSES


def _samples_file(bench: Bench, row: Row, samples: range) -> Path:
    """Write some of the training samples to a file of the row."""
    lines = bench.material.train_file.read_bytes().splitlines(keepends=True)
    path = bench.out / "work" / f"{row.name}.jsonl"
    write_file(path, b"".join(lines[samples.start : samples.stop]))
    return path


def _rehearse(bench: Bench, base: Base) -> dict[str, float]:
    """Measure how fast this machine extracts for the method and trains it; kept in a file."""
    path = bench.out / "speeds" / f"{bench.method.name}.json"
    if path.exists():
        found: dict[str, float] = json.loads(path.read_text())
        return found
    number = bench.material.count_samples(_PILOT_TOKENS)
    root, data = bench.out / "work" / "pilot", bench.out / "work" / "pilot.jsonl"
    lines = bench.material.train_file.read_bytes().splitlines(keepends=True)
    write_file(data, b"".join(lines[:number]))
    shutil.rmtree(root, ignore_errors=True)
    started_at = time.perf_counter()
    forward_s = _extract(bench, base, data, root)
    fixed_s = time.perf_counter() - started_at - forward_s
    store = Store.open(root)
    learner = _build(bench, store, seed=0)
    optimizer = build_optimizer(learner.model, OptimizationSettings(), MemorySettings())  # type: ignore[arg-type]
    read = read_store(store, bench.material.train, read_taps(bench.method))
    steps = iter_steps(
        bench.material.train, number, seed=0, tokens_per_step=bench.settings.tokens_per_step
    )
    speeds = []
    for _ in range(_PILOT_STEPS):
        started_at = time.perf_counter()
        batch = read(next(steps)[1])
        _step(learner, optimizer, batch, rate=1e-9)
        speeds.append(batch.num_tokens / (time.perf_counter() - started_at))
    found = {
        "extract": store.num_tokens / forward_s,
        "fixed_s": fixed_s,
        "train": float(np.median(speeds[1:])),
    }
    shutil.rmtree(root)
    write_json(path, found)
    return found


def _shared_store(bench: Bench) -> tuple[Store, dict[str, Any]]:
    """Return the store of all training samples; its extraction goes on where it was stopped."""
    root = bench.out / "stores" / _store_name(bench.method)
    _finish(bench, bench.material.train_file, root)
    store = Store.open(root)
    seconds = sum(store.receipt(unit).elapsed_s for unit in range(store.num_units))
    return store, {"seconds": seconds, "tokens": store.num_tokens}


def _held_out_store(bench: Bench) -> Store:
    root = bench.out / "stores" / f"held-out-{_store_name(bench.method)}"
    _finish(bench, bench.material.held_out_file, root)
    return Store.open(root)


def _finish(bench: Bench, data: Path, root: Path) -> None:
    mark = root.with_name(f"{root.name}.done")
    if not mark.exists():
        _extract(bench, load_base(bench.base, forward=ForwardSettings()), data, root)
        write_file(mark, b"")


def _extract(bench: Bench, base: Base, data: Path, root: Path, *, append: bool = False) -> float:
    """Extract the taps and blocks of the method; return the seconds of the forward passes."""
    shape = bench.method.carryon
    assert shape is not None
    return run_extraction(
        base=base,
        data=[data],
        out=root,
        corpus=corpus_settings(),
        store=StoreSettings(
            taps=read_taps(bench.method),
            unit_tokens=UNIT_TOKENS,
            with_blocks={"native": 1, "top": shape.blocks}.get(shape.kind, 0),
        ),
        forward=ForwardSettings(),
        append=append,
    ).elapsed_s


def _store_name(method: Method) -> str:
    shape = method.carryon
    assert shape is not None
    blocks = [] if shape.kind == "bottleneck" else [f"{shape.kind}.{shape.blocks}"]
    return "-".join([*read_taps(method), *blocks])


def best_rate(method: Method, settings: CompareSettings, done: Sequence[dict[str, Any]]) -> float:
    """Return the learning rate whose short run ended lowest; the only one, where there is one."""
    if len(method.rates) == 1:
        return method.rates[0]
    sweeps = {
        row["learning_rate"]: row["nll"]
        for row in done
        if row["method"] == method.name
        and row["run"] == "sweep"
        and row["seconds"] == settings.sweep_seconds
    }
    return min(method.rates, key=lambda rate: sweeps.get(rate, float("inf")))


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    with log_to_stderr(_request.pop("log_level")):
        main(_request)
