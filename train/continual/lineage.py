"""A lineage: a trunk at the highest learning rate, and for every release a branch that falls.

lineage_folder.py says what is in its folder. Every segment is a run of its own, which begins with a
copy of the state in which another ended. A branch so leaves the trunk as it is, and begun again it
ends with the same bits.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, MissingError
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.view import manifest_of_part, split_name
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage_dir import (
    Increment,
    Lineage,
    lasting_settings,
    read_lineage,
    refuse_changed_base,
    refuse_changed_settings,
    settings_of,
    write_config,
    write_lineage,
)
from carryon.train.continual.texts import extract_text
from carryon.train.data.datasets import open_data
from carryon.train.data.sampler import count_steps
from carryon.train.modules.taps import resolve_taps, stream_taps
from carryon.train.optim.lr_paths import BRANCH_SCHEDULES, Paradigm, branch_point
from carryon.train.trainer.checkpoint import newest_checkpoint
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.run_dir import RunFolder
from carryon.train.trainer.segment import Segment
from carryon.train.trainer.trainer import Job, train_jointly

logger = logging.getLogger(__name__)

DEFAULT_ALPHA = 0.6
"""Fraction of an increment's steps in which a branch decays."""


def update(
    lineage: str | Path,
    *,
    store: str | Path | Sequence[str | Path] = (),
    data: str | Path | Sequence[str | Path] = (),
    base: str | Path = "",
    alpha: float | None = None,
    settings: TrainSettings | None = None,
    **options: Any,  # noqa: ANN401
) -> TrainReport:
    """Train on new data and release the next version of a lineage.

    An unfinished version is finished first. The same call resumes an interrupted one.

    Args:
        lineage: folder of the lineage; created if missing.
        store: folder of a store, or several. Its parts that the lineage has not seen are the new
            data. None given: LINEAGE/store.
        data: files of new texts, or folders of such files. They are first extracted into the
            store, of which there is then one.
        base: hub id, folder or .gguf file of the base that extracts `data`.
        alpha: fraction of an increment's steps in which a branch decays. None: the lineage's, and
            0.6 for a new one.
        settings: settings of all runs, the same in each update. None: the lineage's, and the
            defaults for a new one.
        options: fields of `settings` by name, such as `learning_rate=1e-3`.

    Raises:
        InputError: no new data, another base, other settings, or too few steps for alpha.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    found = read_lineage(lineage)
    if settings is None:
        settings = settings_of(found) if found else TrainSettings()
    settings = settings.with_options(**options)
    if alpha is None:
        alpha = found.alpha if found else DEFAULT_ALPHA
    store, data = _names(store), _names(data)
    check_branches(settings)
    if found is None:
        found = Lineage(
            root=Path(lineage),
            base={},
            alpha=alpha,
            settings=lasting_settings(settings),
            increments=[],
        )
    settings = settings_on(found.base, settings)
    refuse_changed_settings(found, settings, alpha=alpha)
    stores = list(store) or [str(found.store)]
    if data:
        extract_text(found, data, base=str(base), stores=stores, settings=settings)
    elif not store and not found.store.exists():
        raise InputError(f"{lineage}: expected --data or --store with the new data, got neither")
    report = None
    if found.increments and len(found.released) < len(found.increments):
        report = release_newest(found, settings)
    new = _unseen(found, stores)
    if not new and report is None:
        raise InputError(
            f"{' '.join(stores)}: expected new data, got only what the lineage has seen in its "
            f"{len(found.increments)} increments: give new texts with --data, or append them with "
            "carryon extract --append"
        )
    if new:
        report = release_newest(grow(found, new, settings), settings)
    assert report is not None
    return report


def _names(paths: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def grow(lineage: Lineage, parts: Sequence[str], settings: TrainSettings) -> Lineage:
    """Return the lineage with parts of stores as its last increment, written down.

    Raises:
        InputError: they are of another base, or have too few steps for alpha.
    """
    base = read_manifest(split_name(parts[0])[0]).base
    settings = settings_on(base, settings)
    data = open_data(list(parts), settings.stream, taps=stream_taps(settings.carryon))
    if not lineage.increments:
        lineage = replace(lineage, base=base, settings=lasting_settings(settings))
    refuse_changed_base(lineage, base, name=parts[0])
    steps = sum(map(count_steps, data.plan(settings.optimization)))
    branch_point(0, steps, alpha=lineage.alpha)
    grown = Increment(stores=list(parts), fingerprints=data.fingerprints, steps=steps)
    lineage = replace(lineage, increments=[*lineage.increments, grown])
    logger.info(
        f"{lineage.root}: increment {len(lineage.increments)}, {' '.join(parts)}: {steps} steps"
    )
    write_lineage(lineage)
    write_config(lineage, settings)
    return lineage


def release_newest(lineage: Lineage, settings: TrainSettings) -> TrainReport:
    """Move the trunk up to the newest increment's branch point, and release its version."""
    version = len(lineage.increments)
    if version > 1:
        _train(lineage, version - 1, "tail", settings)
    _train(lineage, version, "head", settings)
    return release(lineage, version, settings=settings, out=lineage.version(version).root)


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
    segment = _segment(
        lineage,
        version,
        paradigm="switch",
        first=lineage.branch_step(version),
        stop=lineage.increments[version - 1].steps,
        start=_start_of_branch(lineage, version),
    )
    return _run(lineage, version, segment, settings=settings, out=out)


def release_anew(lineage: Lineage, settings: TrainSettings) -> TrainReport:
    """Train the first version's whole path from an untrained carry-on, in LINEAGE/anew."""
    steps = lineage.increments[0].steps
    segment = _segment(lineage, 1, paradigm="switch", first=0, stop=steps, start=None)
    return _run(lineage, 1, segment, settings=settings, out=lineage.root / "anew")


def settings_on(base: Mapping[str, Any], settings: TrainSettings) -> TrainSettings:
    """Return settings with the tap that the carry-on's kind reads on a base, once that is known."""
    if "num_layers" not in base:
        return settings
    return replace(settings, carryon=resolve_taps(settings.carryon, base["num_layers"]))


def check_branches(settings: TrainSettings) -> None:
    """Check that settings can be those of a lineage.

    Raises:
        InputError: they cannot.
    """
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


def _unseen(lineage: Lineage, stores: Sequence[str]) -> list[str]:
    """Return STORE#NUMBER of each part that is in no increment."""
    seen = {print_ for each in lineage.increments for print_ in each.fingerprints}
    found = []
    for store in stores:
        folder, chosen = split_name(store)
        manifest = read_manifest(folder)
        for number in [chosen] if chosen else range(1, len(manifest.parts) + 1):
            print_ = manifest_of_part(manifest, number, name=str(folder)).fingerprint
            if print_ not in seen:
                seen.add(print_)
                found.append(f"{folder.resolve()}#{number}")
    return found


def _train(lineage: Lineage, version: int, part: str, settings: TrainSettings) -> None:
    """Train a segment of the trunk, unless it is there or has no steps."""
    branch, steps = lineage.branch_step(version), lineage.increments[version - 1].steps
    is_head = part == "head"
    if is_head and branch == 0:
        return
    start = _end_of_trunk(lineage, version - 1) if is_head else _start_of_branch(lineage, version)
    segment = _segment(
        lineage,
        version,
        paradigm="trunk",
        first=0 if is_head else branch,
        stop=branch if is_head else steps,
        start=start,
    )
    out = (lineage.head if is_head else lineage.tail)(version).root
    _run(lineage, version, segment, settings=settings, out=out)


def _segment(
    lineage: Lineage,
    version: int,
    *,
    paradigm: Paradigm,
    first: int,
    stop: int,
    start: Path | None,
) -> Segment:
    ends = lineage.ends[:version]
    return Segment(
        paradigm=paradigm,
        version=version,
        ends=tuple(ends),
        alpha=lineage.alpha,
        first=first,
        stop=stop,
        offset=ends[-1] - lineage.increments[version - 1].steps,
        start=start,
        seen=tuple(
            each for past in lineage.increments[: version - 1] for each in past.fingerprints
        ),
    )


def _run(
    lineage: Lineage, version: int, segment: Segment, *, settings: TrainSettings, out: str | Path
) -> TrainReport:
    job = Job(out=str(out), settings=settings, segment=segment)
    [report] = train_jointly(lineage.increments[version - 1].stores, [job])
    return report


def _start_of_branch(lineage: Lineage, version: int) -> Path | None:
    if lineage.branch_step(version) == 0:
        return _end_of_trunk(lineage, version - 1)
    return _state(lineage.head(version))


def _end_of_trunk(lineage: Lineage, version: int) -> Path | None:
    if version:
        return _state(lineage.tail(version))
    return newest_checkpoint(lineage.start) if lineage.predecessor else None


def _state(folder: RunFolder) -> Path:
    newest = newest_checkpoint(folder.checkpoints) if folder.result.exists() else None
    if newest is None:
        raise MissingError(f"{folder.root}: expected a finished segment of the trunk, found none")
    return newest
