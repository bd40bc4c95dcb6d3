"""`growth`: how the seconds of an epoch grow with tokens, units, samples, taps, width, ...

A cost that grows as the n-th power of a size is a line of slope n where both axes are logarithmic.
The exponent between the two largest sizes counts: constant costs hide the growth of small ones.
"""

import logging
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.progress import Progress
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.disk import charge_nothing
from carryon.tools.bench.epoch import run_store_epoch
from carryon.tools.bench.job import timed
from carryon.tools.bench.loss import loss_way, make_loss_input
from carryon.tools.bench.many_units import first_batch
from carryon.tools.bench.run import print_table
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states
from carryon.tools.compare.figure import Figure, print_json
from carryon.train.config import StreamSettings, TrainSettings
from carryon.train.plots import Axes, draw
from carryon.train.trainer.run import Job as TrainJob
from carryon.train.trainer.trainer import train_jointly

LINEAR = 1.1
"""Most that an exponent may be: linear, and noise."""
FLAT = 0.3
"""The same of what opens, of which parts of a millisecond are noise."""
_SHORT_TIMES = 7
"""As many measurements of hundredths of a second for each one of an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A store of made-up states."""

    samples: int = 640
    mean_tokens: int = 300
    unit_tokens: int = 8192
    taps: int = 1
    width: int = 64

    def write(self, root: Path) -> Store:
        """Write it and open it."""
        states = make_states(
            "growth",
            num_samples=self.samples,
            width=self.width,
            num_taps=self.taps,
            mean_tokens=self.mean_tokens,
            max_tokens=min(4 * self.mean_tokens, self.unit_tokens, 1024),
            seed=0,
        )
        settings = StoreSettings(taps=states.taps, unit_tokens=self.unit_tokens)
        write_scratch_store(root, states, settings=settings)
        return Store.open(root)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """What grows, and what takes time then."""

    name: str
    sizes: Sequence[int]
    prepare: Callable[[int, Path], Mapping[str, Callable[[], float]]]
    """Makes what a size needs in an empty folder; returns ways to measure, which give seconds. A
    way called `epoch` is to be linear, others are to stay as they are."""
    unit: str = "s of an epoch"


def growth(
    *, rounds: int = 3, times: float = 1.0, out: str = "", work: str = ""
) -> list[dict[str, Any]]:
    """Measure how seconds grow with the size of things: nothing faster than linearly.

    Each axis is measured at about 1, 10 and 100 times its smallest size. A figure is the exponent
    between the two largest; the details have the sizes, the seconds and the exponent of all.
    `growth.open` and `growth.resume` are those of opening a store and of the first batch at 90 % of
    an epoch, for the axes of a store.

    Example:
        python -m carryon.tools.bench growth --out growth

    Args:
        rounds: Measurements of each size, seven times as many of those that take hundredths of a
            second; the median counts.
        times: Multiplies all sizes; less than 1 only shows that it runs.
        out: Folder for growth.png, a plot of each axis. Empty: none.
        work: Folder for temporary files. Empty: the system's.
    """
    if rounds < 1 or not 0 < times <= 10:
        raise InputError(
            f"--rounds, --times: expected 1 or more, and 0 to 10, got {rounds}, {times}"
        )
    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    axes = make_axes(times)
    curves = dict[str, tuple[list[int], list[float]]]()
    figures = list[Figure]()
    with (
        tempfile.TemporaryDirectory(prefix="carryon-growth-", dir=work or None) as folder,
        Progress(sum(len(axis.sizes) for axis in axes), name="growth", unit="sizes") as progress,
    ):
        for axis in axes:
            progress.note = axis.name
            seconds = dict[str, list[float]]()
            for size in axis.sizes:
                root = Path(folder) / "made"
                root.mkdir()
                for way, measure in axis.prepare(size, root).items():
                    repeats = rounds if way == "epoch" else _SHORT_TIMES * rounds
                    took = statistics.median(measure() for _ in range(repeats))
                    seconds.setdefault(way, []).append(took)
                shutil.rmtree(root)
                progress.update(1)
            for way, values in seconds.items():
                name = axis.name if way == "epoch" else f"{axis.name}.{way}"
                curves[name] = (list(axis.sizes), values)
                figures.append(to_figure(name, axis, values, is_flat=way != "epoch"))
                print_json(figures[-1])
    print_table(figures)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        panels = [partial(_panel, name, *curve) for name, curve in curves.items()]
        draw(Path(out) / "growth.png", *panels, width=3.2, height=3.0)
    return [figure.to_dict() for figure in figures]


def make_axes(times: float) -> list[Axis]:
    """Return what is measured, all sizes multiplied by `times`."""

    def scaled(*sizes: int) -> list[int]:
        return [max(8, round(size * times)) for size in sizes]

    few = scaled(640)[0]
    return [
        Axis(
            name="tokens",
            sizes=scaled(64, 640, 6400),
            prepare=lambda samples, root: _store_ways(Shape(samples=samples), root),
            unit="s of an epoch of as many samples of 300 tokens",
        ),
        Axis(
            name="samples",
            sizes=scaled(192, 1920, 19_200),
            prepare=lambda samples, root: _store_ways(
                Shape(samples=samples, mean_tokens=max(2, scaled(192_000)[0] // samples)), root
            ),
            unit="s of an epoch of the same tokens",
        ),
        Axis(
            name="units",
            sizes=[1, 8, 64],
            prepare=lambda parts, root: _store_ways(
                Shape(samples=few, unit_tokens=65_536 // parts), root
            ),
            unit="s of an epoch of the same tokens in as many times the units",
        ),
        Axis(
            name="taps",
            sizes=[1, 4, 16],
            prepare=lambda taps, root: _epoch_way(Shape(samples=few, taps=taps), root),
        ),
        Axis(
            name="width",
            sizes=[64, 512, 4096],
            prepare=lambda width, root: _epoch_way(Shape(samples=scaled(64)[0], width=width), root),
        ),
        Axis(
            name="vocabulary",
            sizes=[2048, 20_480, 204_800],
            prepare=lambda vocabulary, _: _loss_ways(scaled(512)[0], vocabulary),
            unit="s of loss and gradient",
        ),
        Axis(
            name="carry-ons",
            sizes=[1, 8, 64],
            prepare=lambda runs, root: _sweep_ways(Shape(samples=scaled(32)[0]), runs, root),
            unit="s of a sweep of as many",
        ),
    ]


def _store_ways(shape: Shape, root: Path) -> dict[str, Callable[[], float]]:
    store = shape.write(root / "store")
    settings = StreamSettings()

    def epoch() -> float:
        return run_store_epoch(store, seed=0, settings=settings, charge=charge_nothing).elapsed_s

    def opened() -> float:
        started_at = time.perf_counter()
        Store.open(store.root)
        return time.perf_counter() - started_at

    def resumed() -> float:
        return first_batch(store.root, at=0.9, taps=store.taps)

    epoch()  # caches, and the first use of threads
    return {"epoch": epoch, "open": opened, "resume": resumed}


def _epoch_way(shape: Shape, root: Path) -> dict[str, Callable[[], float]]:
    # A store opens as many arrays as it has taps, and a first batch has their states.
    return {"epoch": _store_ways(shape, root)["epoch"]}


def _loss_ways(positions: int, vocabulary: int) -> dict[str, Callable[[], float]]:
    given = make_loss_input(positions=positions, width=64, vocabulary=vocabulary)
    return {"epoch": timed(loss_way(given))}


def _sweep_ways(shape: Shape, runs: int, root: Path) -> dict[str, Callable[[], float]]:
    store = shape.write(root / "store")
    settings = TrainSettings.from_options(
        epochs=1, tokens_per_step=1024, width=16, heads=2, intermediate_size=16, checkpoint_every=0
    )

    def sweep() -> float:
        out = Path(tempfile.mkdtemp(dir=root))
        jobs = [TrainJob(out=str(out / str(run)), settings=settings) for run in range(runs)]
        started_at = time.perf_counter()
        with _warnings_only():  # not two lines for each of 64 runs
            train_jointly([str(store.root)], jobs)
        return time.perf_counter() - started_at

    return {"epoch": sweep}


@contextmanager
def _warnings_only() -> Iterator[None]:
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def exponents(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the exponent of seconds by size: over all (least squares), and between the last two.

    Args:
        sizes: at least two, ascending.
        seconds: of each.
    """
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope = covariance / sum((x - mean_x) ** 2 for x in xs)
    return slope, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])


def to_figure(name: str, axis: Axis, seconds: Sequence[float], *, is_flat: bool) -> Figure:
    """Return the figure of a curve."""
    over_all, last = exponents(axis.sizes, seconds)
    details = {"sizes": list(axis.sizes), "seconds": list(seconds), "over_all": over_all}
    return Figure(
        figure=f"growth.{name}",
        value=last,
        target=FLAT if is_flat else LINEAR,
        unit="exponent" if is_flat else f"exponent of {axis.unit}",
        details=details,
    )


def _panel(name: str, sizes: Sequence[float], seconds: Sequence[float], axes: Axes) -> None:
    axes.loglog(sizes, seconds, marker="o", markersize=4)
    linear = [seconds[0] * size / sizes[0] for size in sizes]
    axes.loglog(sizes, linear, linestyle=":", color="gray", label="linear")
    axes.set(title=name, xlabel="size", ylabel="s")
