"""A lineage: a trunk at the highest learning rate, and for every release a branch that falls.

lineage.json        base, settings, alpha, and every increment of data with its steps
config.yaml         the settings, flat, for the next update
trunk/0002-head     run folder: increment 2 up to the branch point
trunk/0002-tail     run folder: the rest of it, taken when the next version is asked for
versions/0002       run folder: the branch; its carryon/ is version 2

Every piece is a run of its own, which begins with a copy of the state in which another ended. A
branch so leaves the trunk as it is, and begun again it ends with the same bits.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.atomic import write_file, write_json
from carryon.cache.errors import InputError, MissingError
from carryon.cache.manifest import read_manifest
from carryon.train.blocks_carryon import with_own_tap
from carryon.train.checkpoint import newest_checkpoint
from carryon.train.evaluate import stream_taps
from carryon.train.loop import Job, train_jointly
from carryon.train.order import count_steps
from carryon.train.paths import BRANCH_SCHEDULES, Paradigm, branch_point
from carryon.train.piece import Piece
from carryon.train.report import TrainReport
from carryon.train.run import TrainSettings
from carryon.train.run_folder import FREE_SETTINGS, RunFolder
from carryon.train.train_data import TrainData, open_data

FORMAT = "carryon-lineage"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """The data of one update."""

    stores: list[str]
    """Folders of the stores."""
    fingerprints: list[str]
    steps: int
    """Steps of its whole order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """What a lineage folder says of itself."""

    root: Path
    base: dict[str, Any]
    alpha: float
    settings: dict[str, Any]
    """Flat, without those that a resumed run may change."""
    increments: list[Increment]

    @property
    def ends(self) -> list[int]:
        """The step of the trunk at which each increment ends."""
        return list(accumulate(increment.steps for increment in self.increments))

    def branch_step(self, version: int) -> int:
        """Return the step of a version's increment at which its branch leaves the trunk."""
        return branch_point(0, self.increments[version - 1].steps, alpha=self.alpha)

    def head(self, version: int) -> RunFolder:
        """Return the trunk's piece up to a version's branch point."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-head")

    def tail(self, version: int) -> RunFolder:
        """Return the trunk's piece from a version's branch point to the increment's end."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-tail")

    def version(self, version: int) -> RunFolder:
        """Return the branch that is a version."""
        return RunFolder(root=self.root / "versions" / f"{version:04d}")


def read_lineage(root: str | Path) -> Lineage | None:
    """Return the lineage in a folder; None where there is none.

    Raises:
        InputError: the folder holds something else.
    """
    path = Path(root) / "lineage.json"
    if not path.exists():
        if Path(root).exists() and (not Path(root).is_dir() or any(Path(root).iterdir())):
            raise InputError(f"{root}: holds something that is not a lineage: give a new folder")
        return None
    document = json.loads(path.read_text(encoding="ascii"))
    if (document.pop("format"), document.pop("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{path}: expected {FORMAT} {FORMAT_VERSION}: it is of another version")
    increments = [Increment(**each) for each in document.pop("increments")]
    return Lineage(root=Path(root), increments=increments, **document)


def update(
    *, lineage: str, store: Sequence[str], settings: TrainSettings, alpha: float = 0.6
) -> TrainReport:
    """Move the trunk on to new data, branch, and release the next version.

    Interrupted, the same call goes on.

    Args:
        lineage: folder of the lineage; begun if missing.
        store: folders of the stores with the new data.
        settings: of all runs of the lineage, the same from the first update on.
        alpha: part of an increment's steps in which a branch falls.

    Raises:
        InputError: no new data, another base, other settings, or too few steps for alpha.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    _check_settings(settings)
    shape = with_own_tap(settings.carryon, read_manifest(Path(store[0])))
    settings = replace(settings, carryon=shape)
    data = open_data(list(store), settings.stream, taps=stream_taps(shape))
    found = _grow(lineage, list(store), data, settings, alpha)
    version = len(found.increments)
    if version > 1:
        _train(found, version - 1, "tail", settings)
    _train(found, version, "head", settings)
    return release(found, version, settings=settings, out=found.version(version).root)


def release(
    lineage: Lineage, version: int, *, settings: TrainSettings, out: str | Path
) -> TrainReport:
    """Train the branch of a version, as a run in `out`; again in another folder, the same bits.

    Raises:
        MissingError: there is no such version.
    """
    if not 1 <= version <= len(lineage.increments):
        raise MissingError(
            f"{lineage.root}: expected a version from 1 to {len(lineage.increments)}, got {version}"
        )
    piece = _piece(
        lineage,
        version,
        paradigm="switch",
        first=lineage.branch_step(version),
        stop=lineage.increments[version - 1].steps,
        start=_start_of_branch(lineage, version),
    )
    return _run(lineage, version, piece, settings=settings, out=out)


def _train(lineage: Lineage, version: int, part: str, settings: TrainSettings) -> None:
    """Train a piece of the trunk, unless it is there or has no steps."""
    branch, steps = lineage.branch_step(version), lineage.increments[version - 1].steps
    is_head = part == "head"
    if is_head and branch == 0:
        return
    start = _end_of_trunk(lineage, version - 1) if is_head else _start_of_branch(lineage, version)
    piece = _piece(
        lineage,
        version,
        paradigm="trunk",
        first=0 if is_head else branch,
        stop=branch if is_head else steps,
        start=start,
    )
    out = (lineage.head if is_head else lineage.tail)(version).root
    _run(lineage, version, piece, settings=settings, out=out)


def _piece(
    lineage: Lineage,
    version: int,
    *,
    paradigm: Paradigm,
    first: int,
    stop: int,
    start: Path | None,
) -> Piece:
    ends = lineage.ends[:version]
    return Piece(
        paradigm=paradigm,
        version=version,
        ends=tuple(ends),
        alpha=lineage.alpha,
        first=first,
        stop=stop,
        offset=ends[-1] - lineage.increments[version - 1].steps,
        start=start,
    )


def _run(
    lineage: Lineage, version: int, piece: Piece, *, settings: TrainSettings, out: str | Path
) -> TrainReport:
    job = Job(out=str(out), settings=settings, piece=piece)
    [report] = train_jointly(lineage.increments[version - 1].stores, [job])
    return report


def _start_of_branch(lineage: Lineage, version: int) -> Path | None:
    if lineage.branch_step(version) == 0:
        return _end_of_trunk(lineage, version - 1)
    return _state(lineage.head(version))


def _end_of_trunk(lineage: Lineage, version: int) -> Path | None:
    return _state(lineage.tail(version)) if version else None


def _state(folder: RunFolder) -> Path:
    newest = newest_checkpoint(folder.checkpoints) if folder.result.exists() else None
    if newest is None:
        raise MissingError(f"{folder.root}: expected a finished piece of the trunk, found none")
    return newest


def _grow(
    root: str, stores: list[str], data: TrainData, settings: TrainSettings, alpha: float
) -> Lineage:
    """Return the lineage with the new data as its last increment, written down."""
    lineage = read_lineage(root)
    base = {key: data.store.manifest.base.get(key) for key in ("id", "weights_sha256")}
    lasting = _lasting(settings)
    if lineage is None:
        lineage = Lineage(root=Path(root), base=base, alpha=alpha, settings=lasting, increments=[])
    if lineage.base != base:
        raise InputError(
            f"{stores[0]}: expected a store of the lineage's base {lineage.base}, got {base}"
        )
    expected, got = lineage.settings | {"alpha": lineage.alpha}, lasting | {"alpha": alpha}
    changed = [
        f"{name} {expected.get(name)} -> {got.get(name)}"
        for name in sorted(set(expected) | set(got))
        if expected.get(name) != got.get(name)
    ]
    if changed:
        raise InputError(
            f"{root}: expected the settings of the first update, got {', '.join(changed)}: give "
            f"--config {lineage.root / 'config.yaml'}, or begin another lineage"
        )
    fingerprints = data.fingerprints
    released = len(lineage.increments)
    last = lineage.increments[-1] if lineage.increments else None
    is_begun = last is not None and not lineage.version(released).result.exists()
    if is_begun and last is not None:
        if last.fingerprints != fingerprints:
            raise InputError(
                f"{root}: expected version {released}, which is begun, to be finished first, with "
                f"--store {' '.join(last.stores)}, got {' '.join(stores)}"
            )
        return lineage
    known = {print_ for each in lineage.increments for print_ in each.fingerprints}
    if old := [path for path, print_ in zip(stores, fingerprints, strict=True) if print_ in known]:
        raise InputError(
            f"{old[0]}: expected new data, got a store that the lineage has seen: extract the new "
            "samples to a store of their own"
        )
    if grown_by := [path for path in stores if len(read_manifest(Path(path)).parts) > 1]:
        raise InputError(
            f"{grown_by[0]}: expected a store of new samples alone, got one that was appended to, "
            "whose old samples would be trained on again: extract the new ones to a store of "
            "their own"
        )
    steps = sum(map(count_steps, data.plan(settings.optimization)))
    branch_point(0, steps, alpha=alpha)
    resolved = [str(Path(path).resolve()) for path in stores]
    grown = Increment(stores=resolved, fingerprints=fingerprints, steps=steps)
    lineage = replace(lineage, increments=[*lineage.increments, grown])
    lineage.root.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_dump(settings.to_flat() | {"alpha": alpha}, sort_keys=False)
    write_file(lineage.root / "config.yaml", config.encode())
    document = {
        "base": base,
        "alpha": alpha,
        "settings": lasting,
        "increments": [asdict(each) for each in lineage.increments],
    }
    write_json(
        lineage.root / "lineage.json",
        {"format": FORMAT, "format_version": FORMAT_VERSION, **document},
    )
    return lineage


def _lasting(settings: TrainSettings) -> dict[str, Any]:
    flat = settings.to_flat()
    return {name: value for name, value in flat.items() if name not in FREE_SETTINGS}


def _check_settings(settings: TrainSettings) -> None:
    if settings.optimization.schedule not in BRANCH_SCHEDULES:
        raise InputError(
            f"schedule: expected {', '.join(BRANCH_SCHEDULES)} for a branch, got "
            f"{settings.optimization.schedule}"
        )
    if settings.run.patience or settings.run.finishes_with_best:
        raise InputError(
            "patience and finish_with: expected 0 and last in a lineage, whose versions end with "
            "their last step"
        )
