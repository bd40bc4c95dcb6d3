"""Check carry-ons, runs and lineages against the digests that they hold.

A digest covers the files that decide a result. Of the others, lines and pictures are checked for
their form. Folders from before digests were recorded are checked as far as they go.
"""

import os
import reprlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.files.documents import DIGEST, read_bounded, read_object, read_sealed
from carryon.cache.files.regular import open_regular
from carryon.cache.format.manifest import MANIFEST_PATH
from carryon.cache.lock import FOLDER_LOCK
from carryon.cache.store.verify import Depth
from carryon.cache.store.verify import verify as verify_store
from carryon.train.continual.lineage_dir import DOCUMENTS, open_lineage
from carryon.train.cross_checks import (
    Found,
    check_files_of_run,
    check_runs_of_lineage,
    check_runs_of_sweep,
)
from carryon.train.kinds import get_kind
from carryon.train.mixing.mixture import load_gate
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_file import CARD, GATE, README, WEIGHTS, check_digest, read_signed
from carryon.train.modules.serialization import load_carryon, read_card, read_weights
from carryon.train.saved_settings import with_current_names
from carryon.train.settings_file import check_settings
from carryon.train.trainer.checkpoint import BEST, LAST, OPTIMIZER, STATE, check_checkpoint
from carryon.train.trainer.run_dir import FORMAT, RunFolder
from carryon.train.trainer.run_documents import read_whole_lines
from carryon.train.trainer.sweep import CURVES, SUMMARY

FolderKind = Literal["store", "carry-on", "run", "lineage", "sweep"]
_MARKS: dict[FolderKind, tuple[str, ...]] = {
    "lineage": ("lineage.json", "versions", "trunk"),
    "run": ("run.json", "checkpoints", "metrics.jsonl"),
    "carry-on": (CARD, WEIGHTS),
    "sweep": (SUMMARY,),
}
"""Names that tell a kind, of which a damaged folder may lack some."""
_IDENTITY_KEYS = {*FORMAT, "identity", "versions"}
_HUB_FILES = ("config.json", ".gitattributes")
_PNG = b"\x89PNG\r\n\x1a\n"
_MALFORMED = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    yaml.YAMLError,
)
"""What a document raises that is not as it was written, and has no digest that says so."""
_MAX_TEXT_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProblem:
    """One file that is wrong."""

    path: str
    """Relative to the folder."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderReport:
    """What a verification saw."""

    folder: str
    kind: FolderKind
    problems: list[FileProblem] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Files that do not belong to such a folder; nothing reads them."""
    without_digest: list[str] = field(default_factory=list)
    """Files from before digests were recorded."""
    num_files: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"is_sound": self.is_sound}


def folder_kind(root: str | Path) -> FolderKind:
    """Return what a folder holds, told by its files; `store` if they tell nothing else."""
    folder = Path(root)
    is_store = os.path.lexists(folder / MANIFEST_PATH)
    return _kind_by_names(folder) or ("sweep" if not is_store and _runs_in(folder) else "store")


def _kind_by_names(folder: Path) -> FolderKind | None:
    for kind, names in _MARKS.items():
        if any(os.path.lexists(folder / name) for name in names):
            return kind
    return None


def _runs_in(root: Path) -> list[Path]:
    """Return the folders of runs in a folder; links are left out."""
    return [
        path
        for path in sorted(root.glob("*"))
        if path.is_dir() and not path.is_symlink() and _kind_by_names(path) == "run"
    ]


def verify_folder(root: str | Path, *, depth: Depth = "sample") -> FolderReport:
    """Check a carry-on, a run, a sweep or a lineage; nothing is changed.

    Args:
        root: the folder.
        depth: how much is read of a store in a lineage; all else is read in full.
    """
    folder, kind = Path(root), folder_kind(root)
    walk = _Walk(folder)
    if kind == "lineage":
        walk.check_lineage(folder, depth=depth)
    elif kind == "run":
        walk.check_run(folder)
    elif kind == "sweep":
        walk.check_sweep(folder)
    else:
        walk.check_carryon(folder)
    return FolderReport(
        folder=str(root),
        kind=kind,
        problems=walk.problems,
        unknown=walk.unknown(),
        without_digest=walk.without_digest,
        num_files=len(walk.known),
    )


class _Walk:
    """One pass over the files of a folder, gathering problems."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[FileProblem] = []
        self.without_digest: list[str] = []
        self.known: set[str] = set()
        self.stores: list[Path] = []

    def unknown(self) -> list[str]:
        """Return the files that no check knows; links are not followed."""
        found = []
        for folder, _, names in os.walk(self.root):
            if not any(Path(folder).is_relative_to(store) for store in self.stores):
                found += [self._name(Path(folder, name)) for name in names]
        return sorted(name for name in found if name not in self.known and name != FOLDER_LOCK)

    def check_carryon(self, folder: Path) -> None:
        """Check a carry-on: its digests, and that its weights are those of its card."""
        for name in _HUB_FILES:
            self.known.add(self._name(folder / name))
        card = self._check(folder / CARD, lambda _: _any_card(folder))
        signed = self._check(folder / CARD, read_signed)
        files: Mapping[str, str] = signed[1] if signed else {}
        if signed and not files:
            self.without_digest += [self._name(folder / name) for name in (CARD, WEIGHTS, README)]
        if README in files or os.path.lexists(folder / README):
            self._check(folder / README, lambda path: check_digest(path, files.get(README)))
        self.known.add(self._name(folder / WEIGHTS))
        if card is None:
            return
        is_whole = get_kind(card.settings["kind"]).needs_blocks

        def load(_: Path) -> None:
            if is_whole:
                _finite(folder)
            else:
                load_carryon(folder, allow_mixture=True, allow_states=True)

        self._check(folder / WEIGHTS, load)
        if card.has_gate:
            self.known.add(self._name(folder / GATE))
            self._check(folder / GATE, lambda _: load_gate(folder, card))

    def check_run(self, root: Path) -> None:
        """Check a run: its documents, checkpoints and carry-on."""
        run = RunFolder(root)
        identity = self._check(run.identity, self._identity)
        for path in (run.contamination, run.result):
            if os.path.lexists(path):
                self._check(path, self._sealed)
        is_finished = os.path.lexists(run.result)
        self._check(run.config, lambda path: _check_config(path, identity or {}))
        for path in (run.sessions, run.metrics):
            if is_finished or os.path.lexists(path):
                self._check(path, _check_lines)
        if os.path.lexists(run.curves):
            self._check(run.curves, _check_png)
        if is_finished or run.carryon.exists():
            self.check_carryon(run.carryon)
        self.check_checkpoints(run.checkpoints)
        self._cross_check(run.identity, lambda: check_files_of_run(run))

    def check_sweep(self, root: Path) -> None:
        """Check the runs of a sweep, and what sums them up."""
        for run in _runs_in(root):
            self.check_run(run)
        for name, check in {SUMMARY: self._summary, CURVES: _check_png}.items():
            if os.path.lexists(root / name):
                self._check(root / name, check)
        self._cross_check(root / SUMMARY, lambda: check_runs_of_sweep(root))

    def check_checkpoints(self, folder: Path) -> None:
        """Check every step folder."""
        for name in (LAST, BEST):
            if os.path.lexists(folder / name):
                self._check(folder / name, lambda path: _check_pointer(path, self._sealed(path)))
        for path in sorted(folder.glob("step-*")):
            for name in (WEIGHTS, OPTIMIZER):
                self.known.add(self._name(path / name))
            self._check(path / STATE, lambda state: check_checkpoint(state.parent))
            if (path / STATE).is_file():
                self._check(path / STATE, self._sealed)

    def check_lineage(self, root: Path, *, depth: Depth) -> None:
        """Check a lineage: its documents, its runs, and the store in it."""
        self._check(root / DOCUMENTS[0], lambda _: open_lineage(root))
        for name in DOCUMENTS:
            if os.path.lexists(root / name):
                check = self._sealed if name.endswith(".json") else check_settings
                self._check(root / name, check)
        for name in ("versions.png", "paths.png"):
            if os.path.lexists(root / name):
                self._check(root / name, _check_png)
        for run in sorted([*root.glob("trunk/*"), *root.glob("versions/*")]):
            if run.is_dir():
                self.check_run(run)
        self.check_checkpoints(root / "start")
        self._cross_check(root / DOCUMENTS[0], lambda: check_runs_of_lineage(open_lineage(root)))
        store = root / "store"
        if store.is_dir():
            self.stores.append(store)
            for problem in verify_store(store, depth=depth).problems:
                path = self._name(store / problem.path)
                self.problems.append(FileProblem(path=path, text=problem.text))

    def _check(self, path: Path, check: Callable[[Path], Any]) -> Any:  # noqa: ANN401
        """Call `check` on a file; return its result, or None after noting a problem."""
        name = self._name(path)
        self.known.add(name)
        if str(path.parent / FOLDER_LOCK) not in self.known:
            self.known.add(self._name(path.parent / FOLDER_LOCK))
        try:
            with open_regular(path):
                pass
            return check(path)
        except (CarryOnError, *_MALFORMED) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
            problem = FileProblem(path=name, text=text)
            if problem not in self.problems:
                self.problems.append(problem)
            return None

    def _cross_check(self, path: Path, check: Callable[[], Found]) -> None:
        """Note what a check finds; one that fails is a problem of `path`, unless that has one."""
        named = {problem.path for problem in self.problems}
        try:
            for place, text in check():
                if self._name(place) not in named:
                    problem = FileProblem(path=self._name(place), text=text.splitlines()[0][:500])
                    self.problems.append(problem)
        except (CarryOnError, *_MALFORMED) as error:
            if self._name(path) not in named:
                text = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
                self.problems.append(FileProblem(path=self._name(path), text=text))

    def _sealed(self, path: Path) -> dict[str, Any]:
        values = read_sealed(path)
        if DIGEST not in read_object(path):
            self.without_digest.append(self._name(path))
        return values

    def _summary(self, path: Path) -> None:
        named = {row["run"] for row in self._sealed(path)["runs"]}
        if missing := named - {run.name for run in _runs_in(path.parent)}:
            raise InputError(f"{path}: expected the folder of the run {min(missing)!a:.80}")

    def _identity(self, path: Path) -> dict[str, Any]:
        values = self._sealed(path)
        if set(values) != _IDENTITY_KEYS or {key: values[key] for key in FORMAT} != FORMAT:
            raise InputError(f"{path}: expected the identity of a run, got other keys")
        return dict(values["identity"])

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _any_card(folder: Path) -> CarryOnCard:
    return read_card(folder, allow_mixture=True, allow_states=True)


def _finite(folder: Path) -> None:
    for name, weight in read_weights(folder).items():
        if not bool(torch.isfinite(weight.float()).all()):
            raise InputError(f"{folder}: weights: {name}: expected finite values, got inf or NaN")


def _check_config(path: Path, identity: Mapping[str, Any]) -> None:
    """Compare the settings of a run with those of its identity."""
    config = check_settings(path)
    for name, value in with_current_names(identity).items():
        if name in config and config[name] != value:
            got = reprlib.repr(config[name])
            raise InputError(f"{path}: {name}: expected {value!r:.80} as in run.json, got {got}")


def _check_lines(path: Path) -> None:
    _, damaged = read_whole_lines(path)
    if damaged:
        raise InputError(f"{path}: damaged lines: {', '.join(map(str, damaged[:20]))}")


def _check_pointer(path: Path, pointer: Mapping[str, Any]) -> None:
    named = pointer["folder"]
    if named not in {each.name for each in path.parent.glob("step-*")}:
        raise InputError(f"{path}: expected the name of a step folder, got {named!r:.80}")


def _check_png(path: Path) -> None:
    """Compare the checksum of every chunk of a picture."""
    content = read_bounded(path, max_bytes=_MAX_TEXT_BYTES)
    position, kind = len(_PNG), b""
    is_sound = content.startswith(_PNG)
    while is_sound and kind != b"IEND":
        length = int.from_bytes(content[position : position + 4], "big")
        end = position + 8 + length
        kind = content[position + 4 : position + 8]
        checksum = int.from_bytes(content[end : end + 4], "big")
        is_sound = end + 4 <= len(content)
        is_sound = is_sound and checksum == zlib.crc32(content[position + 4 : end])
        position = end + 4
    if not is_sound or position != len(content):
        raise InputError(f"{path}: expected a PNG as it was written, got a damaged one")
