"""The versions of a lineage: data, steps, cost, and the held-out loss of each on every increment.

What was measured once is kept in LINEAGE/versions.json; learning rates are drawn to
LINEAGE/paths.png.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import MissingError
from carryon.cache.files import write_json
from carryon.tools.bench.path_cost import steps_by_formula, steps_to_take
from carryon.train.continual.lineage_dir import Lineage, open_lineage, settings_of
from carryon.train.data.datasets import open_data
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.carryon import CarryOn, blocks_of
from carryon.train.modules.serialization import load_carryon
from carryon.train.modules.taps import stream_taps
from carryon.train.optim.lr_paths import Paradigm, path_rate
from carryon.train.plots import plot_paths
from carryon.train.trainer.nll import EvalJob, measure_nlls
from carryon.train.trainer.run_dir import RunFolder

COMPARED: dict[str, Paradigm] = {"ptfs": "scratch", "continual": "restart", "switch": "switch"}
"""Paradigms whose cost is shown, by the names that the paper gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedVersion:
    """A released version."""

    version: int
    """Counted from 1."""
    carryon: str
    """Its folder."""
    stores: list[str]
    """The data that is new in it."""
    path_steps: int
    """Steps that its weights have seen."""
    steps_so_far: int
    """Steps taken for it and all before it, trunk and branches, as their runs have counted them."""
    tokens_so_far: int
    """Tokens trained on for it and all before it."""
    seconds_so_far: float
    """Seconds of training for it and all before it."""
    paradigm_steps: dict[str, int]
    """Steps that it and all before it take from scratch (`ptfs`), each from the last (`continual`)
    and by path switching (`switch`), on increments of these lengths."""
    formula_steps: dict[str, float]
    """The same by the formulas for increments of one length, here their mean."""
    held_out_nlls: list[float]
    """On the held-out samples of each increment, the lineage's first to its last."""
    base_nlls: list[float]
    """Of the base alone on the same."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def list_versions(root: str, *, device: str = "auto") -> list[ReleasedVersion]:
    """Return every released version, measured on every increment that has been released.

    Raises:
        MissingError: there is no lineage, or no version in it.
    """
    lineage = open_lineage(root)
    released = lineage.released
    if not released:
        raise MissingError(f"{root}: expected a released version, found none: carryon update")
    nlls = _measure(lineage, released, device=device)
    ends, alpha = lineage.ends, lineage.alpha
    plot_paths(_paths(lineage, released), lineage.root / "paths.png")
    found = []
    steps, tokens, seconds = 0, 0, 0.0
    for number in released:
        for report, first in _pieces(lineage, number):
            steps += report["num_steps"] - first
            tokens += report["num_tokens"]
            seconds += report["train_s"]
        found.append(
            ReleasedVersion(
                version=number,
                carryon=str(lineage.version(number).carryon),
                stores=lineage.increments[number - 1].stores,
                path_steps=ends[number - 1],
                steps_so_far=steps,
                tokens_so_far=tokens,
                seconds_so_far=round(seconds, 3),
                paradigm_steps={
                    name: steps_to_take(paradigm, ends[:number], alpha=alpha)
                    for name, paradigm in COMPARED.items()
                },
                formula_steps={
                    name: _formula(paradigm, number, ends[number - 1], alpha=alpha)
                    for name, paradigm in COMPARED.items()
                },
                held_out_nlls=[nlls[f"{number} on {on}"] for on in released],
                base_nlls=[nlls[f"base on {on}"] for on in released],
            )
        )
    return found


def _formula(paradigm: Paradigm, versions: int, num_steps: int, *, alpha: float) -> float:
    # The formulas are linear in T: of T = 1, times the mean length of an increment.
    unit = steps_by_formula(paradigm, versions=versions, steps=1, alpha=alpha)
    return round(float(unit * num_steps / versions), 1)


def _measure(lineage: Lineage, released: Sequence[int], *, device: str) -> dict[str, float]:
    """Return held-out losses by `VERSION on INCREMENT`, `base` among the versions."""
    path = lineage.root / "versions.json"
    known: dict[str, float] = json.loads(path.read_text("ascii")) if path.exists() else {}
    settings = settings_of(lineage)
    modules: dict[int, CarryOn] = {}
    for on in released:
        wanted = [number for number in released if f"{number} on {on}" not in known]
        if not wanted:
            continue
        taps = stream_taps(settings.carryon)
        data = open_data(lineage.increments[on - 1].stores, settings.stream, taps=taps)
        for number in set(wanted) - set(modules):
            modules[number], _ = load_carryon(
                lineage.version(number).carryon, blocks=partial(blocks_of, data.store)
            )
        place = pick_device(device)
        head = place_head(data.store, settings.loss, device=place)
        chunk = pick_chunk(settings.loss.chunk_tokens)
        is_first = f"base on {on}" not in known
        judged = [
            EvalJob(carryon=modules[number].to(place), head=head, chunk=chunk, with_base=is_first)
            for number in wanted
        ]
        found = measure_nlls(data.store, data.split.held_out, judged, stream=data.settings)
        known |= {f"{v} on {on}": nll.carryon for v, nll in zip(wanted, found, strict=True)}
        if is_first:
            known[f"base on {on}"] = found[0].base
        write_json(path, known)
    return known


def _pieces(lineage: Lineage, version: int) -> list[tuple[dict[str, Any], int]]:
    """Return the reports of the runs that a version took, each with the step it began at."""
    branch = lineage.branch_step(version)
    runs: list[tuple[RunFolder, int]] = [
        (lineage.head(version), 0),
        (lineage.version(version), branch),
    ]
    if version > 1:
        runs.append((lineage.tail(version - 1), lineage.branch_step(version - 1)))
    # An alpha of 1 leaves the trunk no head.
    there = [(folder.result, first) for folder, first in runs if folder.result.exists()]
    return [(json.loads(path.read_text(encoding="ascii")), first) for path, first in there]


def _paths(lineage: Lineage, released: Sequence[int]) -> dict[str, list[float]]:
    settings = settings_of(lineage).optimization
    last = released[-1]
    wanted: list[tuple[str, Paradigm, int]] = [("trunk", "trunk", last)]
    wanted += [(f"version {number}", "switch", number) for number in released]
    return {
        name: [
            path_rate(
                step,
                paradigm=paradigm,
                version=number,
                ends=lineage.ends,
                alpha=lineage.alpha,
                settings=settings,
            )
            for step in range(lineage.ends[number - 1])
        ]
        for name, paradigm, number in wanted
    }
