"""The versions of a lineage: data, steps, cost, and the held-out loss of each on every increment.

What was measured once is kept in LINEAGE/versions.json; learning rates are drawn to
LINEAGE/paths.png.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from carryon.cache.atomic import write_json
from carryon.cache.errors import MissingError
from carryon.train.blocks_carryon import blocks_of
from carryon.train.carryon import CarryOn
from carryon.train.carryon_folder import load_carryon
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)
from carryon.train.device import pick_chunk, pick_device
from carryon.train.evaluate import Judged, measure_nlls, stream_taps
from carryon.train.frozen_head import place_head
from carryon.train.lineage import Lineage, read_lineage
from carryon.train.path_cost import steps_to_take
from carryon.train.paths import path_rate
from carryon.train.plots import plot_paths
from carryon.train.run import TrainSettings
from carryon.train.run_folder import RunFolder
from carryon.train.sweep import change
from carryon.train.train_data import open_data


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
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
    """Steps taken for it and all before it, trunk and branches."""
    scratch_steps: int
    """Steps that it and all before it would take from scratch."""
    seconds_so_far: float
    """Seconds of training for it and all before it."""
    tokens_so_far: int
    """Tokens trained on for it and all before it."""
    held_out_nlls: list[float]
    """On the held-out samples of each increment, the lineage's first to its last."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def list_versions(root: str, *, device: str = "auto") -> list[Version]:
    """Return every released version, measured on every increment that has been released.

    Raises:
        MissingError: there is no lineage, or no version in it.
    """
    lineage = open_lineage(root)
    released = [
        number
        for number in range(1, len(lineage.increments) + 1)
        if lineage.version(number).result.exists()
    ]
    if not released:
        raise MissingError(f"{root}: expected a released version, found none: carryon update")
    nlls = _measure(lineage, released, device=device)
    taken = _ledger(lineage, released)
    ends = lineage.ends
    plot_paths(_paths(lineage, released), lineage.root / "paths.png")
    return [
        Version(
            version=number,
            carryon=str(lineage.version(number).carryon),
            stores=lineage.increments[number - 1].stores,
            path_steps=ends[number - 1],
            steps_so_far=steps_to_take("switch", ends[:number], alpha=lineage.alpha),
            scratch_steps=steps_to_take("scratch", ends[:number], alpha=lineage.alpha),
            seconds_so_far=round(seconds, 3),
            tokens_so_far=tokens,
            held_out_nlls=nlls[number],
        )
        for number, (seconds, tokens) in zip(released, taken, strict=True)
    ]


def open_lineage(root: str) -> Lineage:
    """Return the lineage in a folder.

    Raises:
        MissingError: there is none.
    """
    lineage = read_lineage(root)
    if lineage is None:
        raise MissingError(f"{root}: expected a lineage, found none: carryon update begins one")
    return lineage


def settings_of(lineage: Lineage) -> TrainSettings:
    """Return the settings of a lineage's runs; those that do not decide the result as usual."""
    usual = TrainSettings(
        carryon=CarryOnSettings(),
        optimization=OptimizationSettings(),
        stream=StreamSettings(),
        loss=LossSettings(),
        memory=MemorySettings(),
        run=RunSettings(),
    )
    return change(usual, lineage.settings)


def _measure(lineage: Lineage, released: Sequence[int], *, device: str) -> dict[int, list[float]]:
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
        judged = [
            Judged(
                carryon=modules[number].to(place),
                head=head,
                chunk=pick_chunk(settings.loss.chunk_tokens),
            )
            for number in wanted
        ]
        found = measure_nlls(data.store, data.split.held_out, judged, stream=data.settings)
        known |= {f"{v} on {on}": nll.carryon for v, nll in zip(wanted, found, strict=True)}
        write_json(path, known)
    return {v: [known[f"{v} on {on}"] for on in released] for v in released}


def _ledger(lineage: Lineage, released: Sequence[int]) -> list[tuple[float, int]]:
    """Return seconds and tokens up to each version, as the runs have counted them."""
    seconds, tokens, found = 0.0, 0, []
    for number in released:
        folders = [lineage.head(number), lineage.version(number)]
        folders += [lineage.tail(number - 1)] if number > 1 else []
        for report in _reports(folders):
            seconds += report["train_s"]
            tokens += report["num_tokens"]
        found.append((seconds, tokens))
    return found


def _reports(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    # An alpha of 1 leaves the trunk no head.
    paths: list[Path] = [folder.result for folder in folders if folder.result.exists()]
    return [json.loads(path.read_text(encoding="ascii")) for path in paths]


def _paths(lineage: Lineage, released: Sequence[int]) -> dict[str, list[float]]:
    settings = settings_of(lineage).optimization
    last = released[-1]
    wanted = [("trunk", "trunk", last)]
    wanted += [(f"version {number}", "switch", number) for number in released]
    return {
        name: [
            path_rate(
                step,
                paradigm=paradigm,  # type: ignore[arg-type]
                version=number,
                ends=lineage.ends,
                alpha=lineage.alpha,
                settings=settings,
            )
            for step in range(lineage.ends[number - 1])
        ]
        for name, paradigm, number in wanted
    }
