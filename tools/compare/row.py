"""One row of `carryon compare`: a method trained against the clock.

The clock counts extraction, where the run has one, reading, and training steps. It stops during
evaluation, loading and rehearsal. The learning rate is a function of the elapsed part of the
training time, so it reaches its end with the budget on any machine. A row's file is written last:
a killed row leaves none.
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
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import read_object, write_json
from carryon.cache.progress import Progress
from carryon.cache.settings import DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.cli.output import log_to_stderr
from carryon.tools.compare.data import Material, corpus_settings, iter_steps, prepare_material
from carryon.tools.compare.figure import describe_core
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
"""Passes of a first run with a cheap method. In five minutes, ten passes over manual pages ended
0.8 nats above the base, and four over worked problems 0.11 above the result of eight."""
EVALUATE_AT = (0.25, 0.5, 0.75)
"""Parts of the budget after which a run is evaluated, besides its ends."""
_PILOT_TOKENS = 4096
_PILOT_STEPS = 3
_PARTS = 1000  # of the training time, as steps of the schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A method with its data and folder."""

    settings: CompareSettings
    base: str
    out: Path
    material: Material
    method: Method

    def load_base(self) -> Base:
        """Load the base."""
        return load_base(
            self.base, forward=ForwardSettings(allow_pickle=self.settings.allow_pickle)
        )

    def build(self, store: Store | None, *, seed: int) -> Learner:
        """Return an untrained learner of the method."""
        return build_learner(
            self.method,
            load_base=self.load_base,
            store=store,
            seed=seed,
            samples=self.material.train,
            sampled_softmax=self.settings.sampled_softmax,
        )

    def extract(self, base: Base, data: Path, root: Path, *, append: bool = False) -> float:
        """Extract the method's taps and blocks; return the seconds of the forward passes."""
        shape = self.method.carryon
        assert shape is not None
        plan = plan_extraction(
            base=base,
            data=[data],
            out=root,
            corpus=corpus_settings(),
            store=StoreSettings(
                taps=read_taps(self.method),
                unit_tokens=UNIT_TOKENS,
                with_blocks={"native": 1, "top": shape.blocks}.get(shape.kind, 0),
            ),
            forward=ForwardSettings(),
            data_settings=DataSettings(),
        )
        return run_extraction(plan, append=append).elapsed_s


def main(request: dict[str, Any]) -> None:
    """Make the row of a request in this process and write its file."""
    before = anonymous_bytes()
    settings, row = CompareSettings(**request["settings"]), Row(**request["row"])
    out, base = Path(request["out"]), request["base"]
    methods = get_methods(settings, num_layers=request["num_layers"], width=request["width"])
    setup = Setup(
        settings=settings,
        base=base,
        out=out,
        material=prepare_material(settings, base=base, out=out),
        method=methods[row.method],
    )
    rate = row.learning_rate or request["learning_rate"]
    write_json(out / "rows" / f"{row.name}.json", run_row(setup, row, rate=rate, before=before))


def run_row(setup: Setup, row: Row, *, rate: float, before: int) -> dict[str, Any]:
    """Train a method as the row says; return the measurements.

    Args:
        setup: the method and its data.
        row: which run.
        rate: highest learning rate.
        before: anonymous memory of the process before anything was loaded.
    """
    method, material = setup.method, setup.material
    extraction: dict[str, Any] = {"seconds": 0.0, "tokens": 0}
    store = held_out = None
    num_samples = len(material.train)
    if method.carryon:
        held_out = _finished_store(setup, material.held_out_file, "held-out-")
        if row.run == "first":
            store, extraction = _first_store(setup, row)
        else:
            store = _finished_store(setup, material.train_file, "")
            seconds = sum(store.receipt(unit).elapsed_s for unit in range(store.num_units))
            extraction = {"seconds": seconds, "tokens": store.num_tokens}
        num_samples = store.num_samples
    spent_s = extraction["seconds"] if row.run == "first" else 0.0
    with watched_peak() as peak:
        learner = setup.build(store, seed=row.seed)
        if store is None or held_out is None:
            readers = read_samples(material.train), read_samples(material.held_out)
        else:
            taps = read_taps(method)
            readers = (
                read_store(store, material.train, taps),
                read_store(held_out, material.held_out, taps),
            )
        result = _train(
            setup, row, learner, *readers, num_samples=num_samples, rate=rate, spent_s=spent_s
        )
    if row.run == "first" and store is not None:
        shutil.rmtree(store.root)
    return {
        **asdict(row),
        **result,
        "learning_rate": rate,
        "extraction": extraction,
        "ship_bytes": learner.ship_bytes,
        "peak_bytes": peak.bytes - before,
        "core": describe_core(),
        "data": setup.material.facts,
    }


def _train(
    setup: Setup,
    row: Row,
    learner: Learner,
    read: Reader,
    read_held_out: Reader,
    *,
    num_samples: int,
    rate: float,
    spent_s: float,
) -> dict[str, Any]:
    """Train until the budget ends; return the curve and totals."""
    optimization = OptimizationSettings(learning_rate=rate, warmup_ratio=0.05, seed=row.seed)
    optimizer = build_optimizer(learner.model, optimization, MemorySettings())  # type: ignore[arg-type]
    train, budget_s = setup.material.train, max(1e-9, row.seconds - spent_s)
    steps = iter_steps(
        train, num_samples, seed=row.seed, tokens_per_step=setup.settings.tokens_per_step
    )
    clock_s, tokens, epoch = 0.0, 0, 0
    took: list[float] = []

    def evaluation() -> dict[str, Any]:
        nll = _evaluate(setup, learner, read_held_out)
        at = spent_s + clock_s if took else 0.0
        return {"clock_s": at, "tokens": tokens, "steps": len(took), "nll": nll}

    curve = [_known_start(setup) or evaluation()]
    points = [part * row.seconds for part in EVALUATE_AT if part * row.seconds > spent_s]
    torch.manual_seed(row.seed)
    with Progress(row.seconds, name=row.name, unit="s") as progress:
        progress.update(spent_s)
        while not took or clock_s + 0.5 * float(np.median(took)) < budget_s:
            started_at = time.perf_counter()
            epoch, chosen = next(steps)
            middle_s = clock_s + (0.5 * took[-1] if took else 0.0)
            part = min(_PARTS - 1, int(_PARTS * middle_s / budget_s))
            now = learning_rate(part, num_steps=_PARTS, settings=optimization)
            loss = descend(learner, optimizer, read(chosen), rate=now)
            took.append(time.perf_counter() - started_at)
            clock_s += took[-1]
            tokens += sum(len(train[index].tokens) for index in chosen.tolist())
            progress.note = f"loss {loss:.3f}"
            progress.update(took[-1])
            while points and spent_s + clock_s >= points[0]:
                points.pop(0)
                curve.append(evaluation())
    curve.append(evaluation())
    return {
        "curve": curve,
        "nll": curve[-1]["nll"],
        "base_nll": curve[0]["nll"],
        "train_s": clock_s,
        "tokens": tokens,
        "steps": len(took),
        "epochs": epoch + 1,
        "tokens_per_second": tokens / clock_s,
    }


def descend(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    batch: Any,  # noqa: ANN401
    *,
    rate: float,
) -> float:
    """Take a step and return its mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = learner.losses(batch).mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(learner.weights, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())  # a waiting point: the clock is read after it


@torch.no_grad()
def _evaluate(setup: Setup, learner: Learner, read: Reader) -> float:
    """Return the mean NLL of the held-out targets."""
    num_samples = len(setup.material.held_out)
    total, targets = 0.0, 0
    for first in range(0, num_samples, 4):
        batch = read(np.arange(first, min(first + 4, num_samples)))
        total += float(learner.losses(batch).double().sum())
        targets += batch.num_targets
    return total / targets


def _known_start(setup: Setup) -> dict[str, Any] | None:
    """Return the first evaluation of another row of the method, or None."""
    for path in (setup.out / "rows").glob(f"{setup.method.name}-*.json"):
        row = read_object(path)
        if row["method"] == setup.method.name:
            start: dict[str, Any] = row["curve"][0]
            return start
    return None


def _first_store(setup: Setup, row: Row) -> tuple[Store, dict[str, Any]]:
    """Extract against the clock what the run will read.

    Half of it first: its speed tells how much time the other half may take.
    """
    base = setup.load_base()
    speeds = _rehearse(setup, base)
    reading_s = plan_passes(setup) / speeds["train"]
    a_token_s = 1 / speeds["extract"] + reading_s
    wanted = max(0.0, row.seconds - speeds["fixed_s"]) / a_token_s
    root, data = (setup.out / "work" / f"{row.name}{suffix}" for suffix in ("", ".jsonl"))
    shutil.rmtree(root, ignore_errors=True)
    number = setup.material.count_samples(int(wanted / 2))
    write_file(data, setup.material.train_lines(range(number)))
    started_at = time.perf_counter()
    forward_s = setup.extract(base, data, root)
    seconds = time.perf_counter() - started_at
    tokens = Store.open(root).num_tokens
    a_token_s = forward_s / tokens
    wanted = (row.seconds - seconds + tokens * a_token_s) / (a_token_s + reading_s)
    more = range(number, setup.material.count_samples(int(wanted)))
    if len(more) > 0:
        write_file(data, setup.material.train_lines(more))
        setup.extract(base, data, root, append=True)
        seconds = time.perf_counter() - started_at
    store = Store.open(root)
    return store, {"seconds": seconds, "tokens": store.num_tokens, **speeds}


def plan_passes(setup: Setup) -> float:
    """Return how often a first run plans to read its text: cheap methods several times."""
    if not setup.method.is_cheap:
        return 1.0
    is_prose = all(bool(sample.loss_mask[1:].all()) for sample in setup.material.train)
    return PROSE_PASSES if is_prose else ANSWER_PASSES


def _rehearse(setup: Setup, base: Base) -> dict[str, float]:
    """Measure this machine's speed of extraction and training for the method; kept in a file."""
    path = setup.out / "speeds" / f"{setup.method.name}.json"
    if path.exists():
        known: dict[str, float] = read_object(path)
        return known
    number = setup.material.count_samples(_PILOT_TOKENS)
    root, data = setup.out / "work" / "pilot", setup.out / "work" / "pilot.jsonl"
    write_file(data, setup.material.train_lines(range(number)))
    shutil.rmtree(root, ignore_errors=True)
    started_at = time.perf_counter()
    forward_s = setup.extract(base, data, root)
    fixed_s = time.perf_counter() - started_at - forward_s
    store = Store.open(root)
    learner = setup.build(store, seed=0)
    optimizer = build_optimizer(learner.model, OptimizationSettings(), MemorySettings())  # type: ignore[arg-type]
    read = read_store(store, setup.material.train, read_taps(setup.method))
    steps = iter_steps(
        setup.material.train, number, seed=0, tokens_per_step=setup.settings.tokens_per_step
    )
    speeds = []
    for _ in range(_PILOT_STEPS):
        started_at = time.perf_counter()
        batch = read(next(steps)[1])
        descend(learner, optimizer, batch, rate=1e-9)
        speeds.append(batch.num_tokens / (time.perf_counter() - started_at))
    measured = {
        "extract": store.num_tokens / forward_s,
        "fixed_s": fixed_s,
        "train": float(np.median(speeds[1:])),
    }
    shutil.rmtree(root)
    write_json(path, measured)
    return measured


def _finished_store(setup: Setup, data: Path, prefix: str) -> Store:
    """Return the store of a whole file, extracted once for all methods with the same taps."""
    shape = setup.method.carryon
    assert shape is not None
    blocks = [] if shape.kind == "bottleneck" else [f"{shape.kind}.{shape.blocks}"]
    root = setup.out / "stores" / (prefix + "-".join([*read_taps(setup.method), *blocks]))
    mark = root.with_name(f"{root.name}.done")
    if not mark.exists():
        setup.extract(setup.load_base(), data, root)
        write_file(mark, b"")
    return Store.open(root)


def best_rate(method: Method, settings: CompareSettings, done: Sequence[dict[str, Any]]) -> float:
    """Return the learning rate whose short run ended lowest, or the only one."""
    if len(method.rates) == 1:
        return method.rates[0]
    sweeps = {
        row["learning_rate"]: row["nll"]
        for row in done
        if (row["method"], row["run"], row["seconds"])
        == (method.name, "sweep", settings.seconds_of_sweep)
    }
    return min(method.rates, key=lambda rate: sweeps.get(rate, float("inf")))


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    with log_to_stderr(_request.pop("log_level")):
        main(_request)
