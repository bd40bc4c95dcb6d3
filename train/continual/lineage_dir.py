"""The files of a lineage folder, and what lineage.json records.

lineage.json        base, settings, alpha, and every increment of data with its steps
config.yaml         the settings, flat, for --config of the next update
store/              the growing store, unless another is named
texts.json          paths of the texts that updates have extracted, by SHA-256
start/              checkpoint that the trunk starts from, in a lineage that follows another base's
trunk/0002-head     run folder: increment 2 up to its branch point
trunk/0002-tail     run folder: the rest of increment 2, trained when version 3 needs it
versions/0002       run folder: the branch; its carryon/ is version 2
versions.json       held-out losses measured so far
versions.png        held-out loss of each version on each increment
paths.png           learning rates
.lock               while a process writes: its id
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from carryon.cache.base.identity import refuse_other_quantization
from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.atomic import PARTIAL, REPLACED
from carryon.cache.files.documents import sealed, write_json
from carryon.cache.lock import FOLDER_LOCK, folder_lock
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage_document import (
    check_lineage,
    read_document,
    refuse_folder,
    refuse_link,
)
from carryon.train.optim.lr_paths import branch_point
from carryon.train.saved_settings import setting_of, with_current_names
from carryon.train.trainer.run_dir import FREE_SETTINGS, RunFolder, open_to_write

FORMAT = "carryon-lineage"
FORMAT_VERSION = 2
DOCUMENTS = ("lineage.json", "config.yaml", "texts.json", "versions.json")
"""Files in the folder itself; a killed writer leaves a hidden half of one."""
PLOTS = ("versions.png", "paths.png")
_BEFORE_THE_FIRST_INCREMENT = {"store", "start", "texts.json", "config.yaml", FOLDER_LOCK}


@dataclass(frozen=True, kw_only=True, slots=True)
class Increment:
    """The data of one update."""

    stores: list[str]
    """STORE#NUMBER of each part of a store, absolute; lineage.json names a store inside the
    lineage relative to it."""
    fingerprints: list[str]
    """Fingerprint of each part; a growing store does not change them."""
    steps: int
    """Steps of one training on this data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """What lineage.json records."""

    root: Path
    base: dict[str, Any] = field(default_factory=dict)
    """Identity of the base. Empty before the first increment."""
    alpha: float
    """Fraction of an increment's steps in which a branch decays."""
    settings: dict[str, Any]
    """Flat, without those that a resumed run may change."""
    increments: list[Increment] = field(default_factory=list)
    predecessor: dict[str, Any] | None = None
    """The lineage on another base whose newest version this one starts from, and losses at the
    start. None: it starts from an untrained carry-on."""

    @property
    def ends(self) -> list[int]:
        """The step of the trunk at which each increment ends."""
        return list(accumulate(increment.steps for increment in self.increments))

    @property
    def released(self) -> list[int]:
        """Numbers of the finished versions."""
        numbers = range(1, len(self.increments) + 1)
        return [number for number in numbers if self.version(number).result.exists()]

    @property
    def store(self) -> Path:
        """Folder of the growing store."""
        return self.root / "store"

    @property
    def start(self) -> Path:
        """Folder of the checkpoint that the trunk starts from."""
        return self.root / "start"

    def branch_step(self, version: int) -> int:
        """Return the step of a version's increment at which its branch leaves the trunk."""
        return branch_point(0, self.increments[version - 1].steps, alpha=self.alpha)

    def head(self, version: int) -> RunFolder:
        """Return the run of the trunk up to a version's branch point."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-head")

    def tail(self, version: int) -> RunFolder:
        """Return the run of the trunk from a version's branch point to the increment's end."""
        return RunFolder(root=self.root / "trunk" / f"{version:04d}-tail")

    def version(self, version: int) -> RunFolder:
        """Return the run of the branch that is a version."""
        return RunFolder(root=self.root / "versions" / f"{version:04d}")


def read_lineage(root: str | Path) -> Lineage | None:
    """Return the lineage in a folder; None if the folder is missing or empty.

    Raises:
        InputError: the folder holds something else.
    """
    folder = Path(root)
    path = folder / "lineage.json"
    for name in (*DOCUMENTS, *PLOTS):
        refuse_folder(folder / name)
    if not path.exists():
        if folder.exists() and (
            not folder.is_dir() or any(_is_foreign(entry.name) for entry in folder.iterdir())
        ):
            raise InputError(f"{root}: expected a lineage or a new folder, got something else")
        return None
    document = read_document(path)
    name, version = (document.pop(key, None) for key in ("format", "format_version"))
    if (name, version) != (FORMAT, FORMAT_VERSION):
        raise InputError(
            f"{path}: expected {FORMAT} {FORMAT_VERSION}, got {name!a:.80} {version!a:.80}. Fix: "
            "start another lineage"
        )
    check_lineage(document, path=path)
    document["increments"] = [
        Increment(**each | {"stores": [_absolute(store, folder) for store in each["stores"]]})
        for each in document["increments"]
    ]
    document["settings"] = with_current_names(document["settings"])
    if "anew_nll" in (before := document["predecessor"] or {}):  # its name in older lineages
        before["from_scratch_nll"] = before.pop("anew_nll")
    lineage = Lineage(root=folder, **document)
    try:
        if settings_of(lineage).optimization.learning_rate <= 0:
            raise InputError("learning_rate: expected more than 0, as of a run")
    # settings of a stranger: whatever they make the checks raise
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: settings: {error}") from error
    _refuse_links(lineage)
    return lineage


def _refuse_links(lineage: Lineage) -> None:
    """Check that the folders in a lineage are folders, so that all writes stay in it."""
    root = lineage.root
    refuse_link(root, lineage.start)
    for number, increment in enumerate(lineage.increments, 1):
        for run in (lineage.head(number), lineage.tail(number), lineage.version(number)):
            refuse_link(root, run.root)
        for store in increment.stores:
            if Path(store).is_relative_to(root.resolve()):
                refuse_link(root.resolve(), Path(store.rpartition("#")[0]))


def _is_foreign(name: str) -> bool:
    """Tell whether a name in a folder is none that a killed first update leaves."""
    is_half_written = name.startswith(".") and name.endswith((PARTIAL, REPLACED))
    return name not in _BEFORE_THE_FIRST_INCREMENT and not is_half_written


def open_lineage(root: str | Path) -> Lineage:
    """Return the lineage in a folder.

    Raises:
        MissingError: there is none.
    """
    lineage = read_lineage(root)
    if lineage is None:
        raise MissingError(f"{root}: expected a lineage, found none. Fix: run carryon update")
    return lineage


@contextmanager
def lock_lineage(root: str | Path) -> Iterator[None]:
    """Hold the write lock of a lineage, and remove what a killed writer left half written there.

    Of several processes started by `torchrun` the first one holds it.

    Raises:
        InputError: `root` is not a folder.
        StoreBusyError: another process writes to the lineage; nothing was changed.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    with folder_lock(Path(root), kind="lineage") if is_first else nullcontext():
        for name in DOCUMENTS if is_first else ():
            for path in Path(root).glob(f".{name}.*{PARTIAL}"):
                path.unlink()
        for pattern in ("trunk/*", "versions/*") if is_first else ():
            for lock in Path(root).glob(f"{pattern}/{FOLDER_LOCK}"):
                with open_to_write(lock.parent, kind="run"):
                    pass  # a run that has ended is not opened to write again
        yield


def write_lineage(lineage: Lineage) -> None:
    """Write lineage.json atomically."""
    document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    names = ("base", "alpha", "settings", "predecessor")
    document |= {name: getattr(lineage, name) for name in names}
    document["increments"] = [
        asdict(each) | {"stores": [_relative(store, lineage.root) for store in each.stores]}
        for each in lineage.increments
    ]
    write_json(lineage.root / "lineage.json", sealed(document))


def _relative(store: str, root: Path) -> str:
    """Return the name of a store relative to the lineage that holds it, which may be moved."""
    path, folder = Path(store), root.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else store


def _absolute(store: str, root: Path) -> str:
    return str(root.resolve() / store)


def lasting_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings, flat, that all runs of a lineage have in common.

    The way of the loss is each run's own, and whether its steps are compiled; so is its dtype
    unless it was given: an update may be trained on another machine.
    """
    own = ("loss_way", "compile", "padded_sizes")
    flat = settings.to_flat()
    return {
        name: value for name, value in flat.items() if name not in FREE_SETTINGS and name not in own
    }


def settings_of(lineage: Lineage) -> TrainSettings:
    """Return the settings of a lineage's runs, with defaults for those that may change."""
    return TrainSettings.from_options(**lineage.settings)


def refuse_changed_settings(lineage: Lineage, settings: TrainSettings, *, alpha: float) -> None:
    """Check that an update has the settings of the first one.

    Raises:
        InputError: names each setting that changed, with both values.
    """
    expected = lineage.settings | {"alpha": lineage.alpha}
    if changed := changes(expected, lasting_settings(settings) | {"alpha": alpha}):
        raise InputError(
            f"{lineage.root}: expected the settings of the first update, got {changed}. Fix: give "
            f"--config {lineage.root / 'config.yaml'}, or start another lineage"
        )


def changes(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return the settings that differ, each with both values; empty if none does."""
    return ", ".join(
        f"{name} {expected.get(name)} -> {given.get(name)}"
        for name in sorted({*expected, *given})
        if setting_of(expected, name) != setting_of(given, name)
    )


def refuse_changed_base(lineage: Lineage, base: Mapping[str, Any], *, name: str) -> None:
    """Check by digests that the base of an extraction or a store is the lineage's.

    Raises:
        InputError: names both.
    """
    refuse_other_quantization(lineage.base, base, where=name)
    digests = ("weights_sha256", "config_sha256", "tokenizer_sha256")
    if any(base.get(digest) != lineage.base.get(digest) for digest in digests):
        expected, got = (
            f"{each.get('id')} (weights {str(each.get('weights_sha256'))[:12]})"
            for each in (lineage.base, base)
        )
        raise InputError(
            f"{name}: expected the base of the lineage {lineage.root}, {expected}, got {got}. Fix: "
            "give that base or a store made with it; carryon update --new-base starts a lineage "
            "on another base from this one"
        )
