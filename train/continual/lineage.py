"""Release versions of a carry-on from new data: a trunk and, for each version, a branch.

The trunk keeps the peak learning rate. Each version is a branch off it, on which the rate decays.
Every segment is a run that starts from a copy of another's final state: a branch leaves the trunk
unchanged, and training it again gives the same bits. lineage_dir.py lists the files.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from carryon.cache.checked_settings import apply_options
from carryon.cache.errors import DamagedFileError, InputError, MissingError
from carryon.cache.files.documents import read_sealed
from carryon.cache.format.manifest import read_manifest
from carryon.cache.settings import DataSettings
from carryon.cache.store.reader import split_name
from carryon.train.config import TrainSettings
from carryon.train.continual.increment_data import data_of
from carryon.train.continual.lineage_dir import (
    Increment,
    Lineage,
    lasting_settings,
    lock_lineage,
    read_lineage,
    refuse_changed_base,
    refuse_changed_settings,
    settings_of,
    write_lineage,
)
from carryon.train.continual.lineage_document import refuse_link
from carryon.train.continual.texts import extract_texts
from carryon.train.data.datasets import StorePaths, open_data, store_paths
from carryon.train.data.sampler import count_steps
from carryon.train.modules.taps import resolve_taps
from carryon.train.optim.lr_paths import BRANCH_SCHEDULES, branch_point
from carryon.train.settings_file import write_settings
from carryon.train.trainer.checkpoint import checkpoint_at, newest_checkpoint
from carryon.train.trainer.finish import TrainReport, read_finished
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import RunFolder, saved_choices
from carryon.train.trainer.segment import Segment, digest_of_state
from carryon.train.trainer.trainer import train_jointly

logger = logging.getLogger(__name__)

DEFAULT_ALPHA = 0.6
"""Fraction of an increment's steps in which a branch decays."""
_TRAIN_AGAIN = "put a copy of the original there, or delete {} and run the same command again"


def update(
    lineage: str | Path,
    *,
    store: StorePaths = (),
    data: str | Path | Sequence[str | Path] = (),
    base: str | Path = "",
    alpha: float | None = None,
    settings: TrainSettings | None = None,
    data_settings: DataSettings | None = None,
    allow_pickle: bool = False,
    **options: Any,  # noqa: ANN401 -- each setting has its own type
) -> TrainReport:
    """Train on new data and release the next version of a lineage.

    An unfinished version is finished first. The same call resumes an interrupted one; without new
    data it returns the report of the newest version that was trained on the data given.

    Args:
        lineage: folder of the lineage; created if missing.
        store: folder of a store, or several. Its parts that the lineage has not seen are the new
            data. None given: LINEAGE/store.
        data: files of new texts, folders of such files, or hub ids. They are first extracted
            into the store, of which there is then one.
        base: hub id, folder or .gguf file of the base that extracts `data`.
        alpha: fraction of an increment's steps in which a branch decays. None: the lineage's, and
            0.6 for a new one.
        settings: settings of all runs, the same in each update. None: the lineage's, and the
            defaults for a new one.
        data_settings: how `data` are read. None: defaults.
        allow_pickle: read weights of the base from pickle files too.
        options: fields of both settings by name, such as `learning_rate=1e-3`.

    Raises:
        InputError: another base, other settings, too few steps for alpha, or other data at the
            path of an increment. Nothing was written.
        MissingError: data of an increment that are needed again are not where they were.
        StoreBusyError: another process updates the lineage.
        KeyboardInterrupt: Ctrl-C; the same call resumes.
    """
    with lock_lineage(lineage):
        known = read_lineage(lineage)
        if settings is None:
            settings = settings_of(known) if known else TrainSettings()
        if alpha is None:
            alpha = known.alpha if known else DEFAULT_ALPHA
        reading = {
            item.name: options.pop(item.name)
            for item in fields(DataSettings)
            if item.name in options
        }
        [data_settings] = apply_options(reading, data_settings or DataSettings())
        settings = settings.with_options(**options)
        grown, settings = open_or_start(lineage, settings, alpha=alpha)
        if not store:  # a stranger's link would let this write elsewhere
            refuse_link(grown.root, grown.store)
        stores, texts = store_paths(store) or [str(grown.store)], store_paths(data)
        given = stores
        num_increments = len(grown.increments)
        if len(grown.released) < num_increments:
            _check_data(grown, num_increments)
        if texts:
            _check_tail(grown)
            given = extract_texts(
                grown,
                texts,
                base=str(base),
                stores=stores,
                settings=settings,
                data_settings=data_settings,
                allow_pickle=allow_pickle,
            )
        elif not store and not grown.store.exists():
            raise InputError(
                f"{lineage}: expected --data or --store with the new data, got neither"
            )
        seen = {each for increment in grown.increments for each in increment.fingerprints}
        parts = [part for fingerprint, part in _parts(stores).items() if fingerprint not in seen]
        if parts:
            _check_tail(grown)
        report = None
        if len(grown.released) < len(grown.increments):
            report = release_newest(grown, settings)
        if parts:
            report = release_newest(add_increment(grown, parts, settings), settings)
        return report or _known_report(grown, given, settings)


def open_or_start(
    root: str | Path,
    settings: TrainSettings,
    *,
    alpha: float,
    predecessor: dict[str, Any] | None = None,
) -> tuple[Lineage, TrainSettings]:
    """Return the lineage in a folder, or a new one, and its settings resolved for its base.

    Nothing is written.

    Raises:
        InputError: the folder holds something else, or a lineage with other settings, or the
            settings do not suit a lineage.
    """
    if settings.optimization.schedule not in BRANCH_SCHEDULES:
        raise InputError(
            f"schedule: expected {', '.join(BRANCH_SCHEDULES)} for a branch, got "
            f"{settings.optimization.schedule}"
        )
    if settings.mixing.mix:
        raise InputError(
            "mix: expected none in a lineage, whose versions are of one base, got "
            f"{' '.join(settings.mixing.mix)}. Fix: carryon train --mix"
        )
    settings.check_mix()
    if settings.run.patience or settings.run.finishes_with_best:
        raise InputError(
            "patience and finish_with: expected 0 and last in a lineage, whose versions end with "
            "their last step"
        )
    lineage = read_lineage(root)
    if lineage is None:
        lineage = Lineage(
            root=Path(root),
            alpha=alpha,
            settings=lasting_settings(settings),
            predecessor=predecessor,
        )
    settings = resolve_settings(settings, lineage.base)
    refuse_changed_settings(lineage, settings, alpha=alpha)
    return lineage, settings


def resolve_settings(settings: TrainSettings, base: Mapping[str, Any]) -> TrainSettings:
    """Return settings with the taps that the kind of carry-on reads on `base`, once it is known."""
    if "num_layers" not in base:
        return settings
    return replace(settings, carryon=resolve_taps(settings.carryon, base.get("num_layers", 0)))


def add_increment(lineage: Lineage, parts: Sequence[str], settings: TrainSettings) -> Lineage:
    """Return the lineage with parts of stores as its newest increment, and record it.

    Raises:
        InputError: they are of another base, or have too few steps for alpha.
    """
    base = read_manifest(split_name(parts[0])[0]).base
    settings = resolve_settings(settings, base)
    data = open_data(list(parts), settings)
    if not lineage.increments:
        lineage = replace(lineage, base=base, settings=lasting_settings(settings))
    refuse_changed_base(lineage, base, name=parts[0])
    steps = sum(map(count_steps, data.plan(settings.optimization)))
    branch_point(0, steps, alpha=lineage.alpha)  # refuses too few steps
    increment = Increment(stores=list(parts), fingerprints=data.fingerprints, steps=steps)
    lineage = replace(lineage, increments=[*lineage.increments, increment])
    logger.info(
        f"{lineage.root}: increment {len(lineage.increments)}, {' '.join(parts)}: {steps} steps"
    )
    write_settings(lineage.root / "config.yaml", settings.to_flat() | {"alpha": lineage.alpha})
    write_lineage(lineage)  # last: from here on the increment exists
    return lineage


def release_newest(lineage: Lineage, settings: TrainSettings) -> TrainReport:
    """Train the trunk up to the newest increment's branch point, and release its version."""
    version = len(lineage.increments)
    if version > 1 and not lineage.tail(version - 1).result.exists():
        _train(lineage, version - 1, "tail", settings, lineage.tail(version - 1).root)
    if lineage.branch_step(version):
        _train(lineage, version, "head", settings, lineage.head(version).root)
    return release(lineage, version, settings=settings, out=lineage.version(version).root)


def release(
    lineage: Lineage, version: int, *, settings: TrainSettings, out: str | Path
) -> TrainReport:
    """Train the branch of a version in `out`; in another folder again, with the same bits.

    There the loss has the way and the dtype with which the version was released.

    Raises:
        MissingError: there is no such version.
    """
    if not 1 <= version <= len(lineage.increments):
        raise MissingError(
            f"{lineage.root}: expected a version from 1 to {len(lineage.increments)}, got {version}"
        )
    saved = saved_choices(out) or saved_choices(lineage.version(version).root)
    still_open = {
        name: value for name, value in saved.items() if getattr(settings.loss, name) == "auto"
    }
    settings = settings.with_options(**still_open)
    return _train(lineage, version, "branch", settings, out)


def release_from_scratch(lineage: Lineage, settings: TrainSettings) -> TrainReport:
    """Train the first version's whole path from an untrained carry-on, in LINEAGE/from-scratch."""
    return _train(lineage, 1, "from scratch", settings, lineage.root / "from-scratch")


def _check_data(lineage: Lineage, version: int) -> None:
    """Check, before anything is written, the data that the release of a version reads."""
    if version > 1:
        _check_tail(replace(lineage, increments=lineage.increments[: version - 1]))
    data_of(lineage, version)


def _check_tail(lineage: Lineage) -> None:
    """Check the data of the trunk's newest increment, if its rest is still to be trained."""
    newest = len(lineage.increments)
    if newest and not lineage.tail(newest).result.exists():
        data_of(lineage, newest)


def _parts(stores: Sequence[str]) -> dict[str, str]:
    """Return STORE#NUMBER of each part of stores, by fingerprint."""
    parts: dict[str, str] = {}
    for store in stores:
        folder, chosen = split_name(store)
        manifest = read_manifest(folder)
        for number in [chosen] if chosen else range(1, len(manifest.parts) + 1):
            part = manifest.of_part(number, name=str(folder))
            parts.setdefault(part.fingerprint, f"{folder.resolve()}#{number}")
    return parts


def _known_report(lineage: Lineage, stores: Sequence[str], settings: TrainSettings) -> TrainReport:
    """Return the report of the newest version whose own data are among parts of stores."""
    given = _parts(stores)
    version = max(
        number
        for number, each in enumerate(lineage.increments, 1)
        if not given.keys().isdisjoint(each.fingerprints)
    )
    logger.info(f"{lineage.root}: no new data; version {version} was released from those given")
    run = lineage.version(version)
    try:
        return _placed(read_finished(run.root), run.root)
    except DamagedFileError:  # the run is finished again
        return release(lineage, version, settings=settings, out=run.root)


def _placed(report: TrainReport, out: str | Path) -> TrainReport:
    """Return a report with the paths of today: a lineage may have been moved since."""
    return replace(report, out=str(out), carryon=str(RunFolder(out).carryon))


def _train(
    lineage: Lineage,
    version: int,
    part: Literal["head", "tail", "branch", "from scratch"],
    settings: TrainSettings,
    out: str | Path,
) -> TrainReport:
    """Train a part of a version's path, or return the report of a finished one."""
    ends, increment = lineage.ends[:version], lineage.increments[version - 1]
    branch = lineage.branch_step(version)
    first = branch if part in ("tail", "branch") else 0
    segment = Segment(
        paradigm="trunk" if part in ("head", "tail") else "switch",
        version=version,
        ends=tuple(ends),
        alpha=lineage.alpha,
        first=first,
        stop=branch if part == "head" else increment.steps,
        offset=ends[-1] - increment.steps,
        start=None if part == "from scratch" else _start(lineage, version, is_branch=first > 0),
        seen=tuple(
            each for past in lineage.increments[: version - 1] for each in past.fingerprints
        ),
    )
    job = Job(out=str(out), settings=settings, segment=segment)
    [report] = train_jointly(data_of(lineage, version), [job])
    return _placed(report, out)


def _start(lineage: Lineage, version: int, *, is_branch: bool) -> Path | None:
    """Return the checkpoint of the trunk at a version's branch point, or at its increment's start.

    Raises:
        MissingError: the trunk is not trained up to there.
        InputError: its state is damaged, or not the one that an earlier run started from.
    """
    if version == 1 and not is_branch:
        return newest_checkpoint(lineage.start) if lineage.predecessor else None
    run = lineage.head(version) if is_branch else lineage.tail(version - 1)
    step = lineage.branch_step(version) if is_branch else lineage.increments[version - 2].steps
    if not run.result.exists():
        raise MissingError(f"{run.root}: expected a finished segment of the trunk, found none")
    try:
        path = checkpoint_at(run.checkpoints, step)
    except DamagedFileError as error:
        raise InputError(f"{error}. Fix: {_TRAIN_AGAIN.format(run.root)}") from error
    got, starts_here = digest_of_state(path), is_branch or not lineage.branch_step(version)
    followers = [lineage.version(version), lineage.tail(version)] if starts_here else []
    for each in followers or [lineage.head(version)]:
        expected = _recorded_start(each)
        if expected not in (None, got):
            raise InputError(
                f"{path}: expected the state {str(expected)[:12]} that {each.root} started from, "
                f"got {got[:12]}. Fix: {_TRAIN_AGAIN.format(run.root)}"
            )
    return path


def _recorded_start(run: RunFolder) -> str | None:
    """Return the digest of the state that a run of a lineage started from; None if unknown."""
    try:
        identity = read_sealed(run.identity).get("identity")
    except DamagedFileError:  # it has not begun, or is mended when it is opened
        return None
    start = identity.get("start_sha256") if isinstance(identity, dict) else None
    return start if isinstance(start, str) else None
