"""Repair of a damaged store: restore or compute again what `verify` reports, and nothing else.

A file of the plan is restored from its copy, or the copy from it; the head comes from the base.
Damaged or missing hidden states are computed again from the tokens in the store. The corpus is
never needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.base.recorded import load_recorded_base, recorded_forward, tokenizer_of
from carryon.cache.errors import DamagedStoreError, InputError, StoreError, UnsafePathError
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.resume import refuse_other_base
from carryon.cache.extraction.sharing.claims import drop_claims
from carryon.cache.files.atomic import remove_anything, sweep_partials, write_file
from carryon.cache.files.regular import read_below
from carryon.cache.format.head_arrays import encode_head
from carryon.cache.format.manifest import (
    ENGINE,
    MANIFEST_PATH,
    MAX_MANIFEST_BYTES,
    Manifest,
    manifest_path,
    parse_manifest,
    read_manifest,
    sha256_hex,
)
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    copy_path,
    is_mirrored,
    receipt_path,
    row_path,
)
from carryon.cache.lock import write_lock
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.top_blocks import block_files
from carryon.cache.store.verify import Problem, verify

_AGAIN = "extract into another folder"
_CONTRADICTIONS = ("probe", "samples")
"""Paths of problems of files that are as written, yet do not fit each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """Summary of a repair."""

    store: str
    problems: list[Problem]
    """Everything that was wrong before."""
    restored_files: list[str]
    """Files of the plan and of the head that were restored."""
    computed_units: list[int]
    """Units whose hidden states were computed again."""
    is_complete: bool
    """Whether a full verification afterwards reports no problem."""


def repair(
    path: str | Path, *, base: str | Base | None = None, forward: ForwardSettings | None = None
) -> RepairReport:
    """Verify the store at `path` in full and repair every problem.

    If it is killed, the same call resumes.

    Args:
        path: folder of the store.
        base: hub id, folder or .gguf file, or a loaded base; it is loaded only if states or the
            head must be made again. None: where the store found it.
        forward: how the base is run; dtype and attention are those of the store.

    Raises:
        MissingError: there is no store, or no such base.
        DamagedStoreError: a file and its copy are both damaged; names it.
        SettingMismatchError: the base is not the one of the store, or computes in another way;
            nothing was computed.
        StoreBusyError: another process writes to the store.
    """
    root, forward = Path(path), forward or ForwardSettings()
    if not (manifest_path(root).exists() or (root / copy_path(MANIFEST_PATH)).exists()):
        read_manifest(root)  # raises MissingError
    with write_lock(root):
        drop_claims(root)
        sweep_partials(root)
        restored = _restore_manifest(root)
        manifest = read_manifest(root)
        problems = verify(root, depth="full").problems
        for problem in problems:
            if problem.path in _CONTRADICTIONS:
                raise DamagedStoreError(problem.text, fix=_AGAIN)
        lost = {problem.unit for problem in problems if _is_of_states(problem)}
        units = sorted(unit for unit in lost if unit is not None)
        restored += _restore_mirrored(root, problems)
        head_paths = [problem.path for problem in problems if not is_mirrored(problem.path)]
        if head_paths or units:
            _refuse_imported(root, manifest, units)
            loaded = _load(root, manifest, base, forward=forward)
            restored += _restore_head(root, manifest, loaded, head_paths)
            for unit in units:
                remove_anything(root / receipt_path(unit))
            run_units(
                root,
                manifest,
                loaded,
                batch_tokens=forward.batch_tokens,
                max_disk_bytes=None,
                units=units,
            )
        after = verify(root, depth="full")
    return RepairReport(
        store=str(root),
        problems=problems,
        restored_files=restored,
        computed_units=units,
        is_complete=after.is_complete,
    )


def _refuse_imported(root: Path, manifest: Manifest, units: Sequence[int]) -> None:
    """Refuse to compute what was imported from files, or rounded in another store."""
    if units and manifest.rounded_as and not manifest.is_lossy:
        raise InputError(
            f"{root}: expected a store whose states the base computes, got a copy of states that "
            f"the profile {manifest.rounded_as} rounded. Fix: remove {receipt_path(units[0])} and "
            "run the same carryon recode again"
        )
    if ENGINE in manifest.forward:
        fix = "import the files, or extract, into another folder"
        if units:
            again = "the same carryon import or extract again"
            fix = f"remove {receipt_path(units[0])} and run {again}, or {fix}"
        raise InputError(
            f"{root}: expected a store whose states the base computed here, got one of files that "
            f"{manifest.forward[ENGINE]} wrote. Fix: {fix}"
        )


def _load(
    root: Path, manifest: Manifest, base: str | Base | None, *, forward: ForwardSettings
) -> Base:
    """Return the base of the store, which computes as the store records.

    Args:
        root: of the store.
        manifest: of the store.
        base: as of `repair`. None: the one that the manifest names.
        forward: as of `repair`.

    Raises:
        MissingError: there is no such base.
        SettingMismatchError: it is another one, or computes in another way.
    """
    names = {"compute_dtype", "attention"} & manifest.forward.keys()
    facts = {name: manifest.forward[name] for name in names}
    forward = recorded_forward(replace(forward, **facts), manifest.base)
    if isinstance(base, Base):
        loaded = base
    elif base:
        loaded = load_base(str(base), forward=forward, like=tokenizer_of(manifest.base))
    else:
        loaded = load_recorded_base(
            manifest.base,
            where=root,
            forward=forward,
            has_own_template=bool(manifest.corpus.get("chat_template")),
        )
    refuse_other_base(manifest, loaded, name=str(root))
    return loaded


def _restore_manifest(root: Path) -> list[str]:
    """Restore the manifest or its copy from the other; each contains its own digest."""
    path, copy = manifest_path(root), root / copy_path(MANIFEST_PATH)
    try:
        read_manifest(root)
    except DamagedStoreError as error:
        try:
            content = read_below(root, copy_path(MANIFEST_PATH), max_bytes=MAX_MANIFEST_BYTES)
            parse_manifest(content, name=str(copy), is_mirrored=True)
        except (StoreError, FileNotFoundError):
            raise DamagedStoreError(
                f"{root}: the manifest and its copy are both damaged", fix=_AGAIN
            ) from error
        write_file(path, content, root=root)
        return [path.name]
    content = read_below(root, MANIFEST_PATH)
    try:
        is_same = read_below(root, copy_path(MANIFEST_PATH)) == content
    except (UnsafePathError, FileNotFoundError):
        is_same = False
    if is_same:
        return []
    write_file(copy, content, root=root)
    return [copy.relative_to(root).as_posix()]


def _restore_mirrored(root: Path, problems: Sequence[Problem]) -> list[str]:
    """Restore files of the plan, and token rows of units, each from its twin."""
    wrong = {problem.path for problem in problems}
    paths = [
        problem.path
        for problem in problems
        if is_mirrored(problem.path) and not _is_of_states(problem)
    ]
    twins = {}
    for path in paths:
        original = path.removeprefix(copy_path(""))
        twins[path] = copy_path(path) if path == original else original
        if twins[path] in wrong:
            raise DamagedStoreError(f"{root}: {original} and its copy are both damaged", fix=_AGAIN)
    for path, twin in twins.items():
        write_file(root / path, read_below(root, twin), root=root)
    return paths


def _restore_head(root: Path, manifest: Manifest, base: Base, paths: list[str]) -> list[str]:
    """Restore files of the head and of the base's last blocks."""
    if not paths:
        return []
    restored = []
    blocks = block_files(base, manifest.num_blocks)
    for path, content in (*encode_head(read_head(base)), *blocks.items()):
        if path not in paths:
            continue
        if sha256_hex(content) not in manifest.files[path]:
            raise DamagedStoreError(
                f"{root / path}: the base's head does not encode to what was written: another "
                "version of numcodecs?",
                fix=_AGAIN,
            )
        write_file(root / path, content, root=root)
        restored.append(path)
    return restored


def _is_of_states(problem: Problem) -> bool:
    """Return whether the problem is solved by computing its unit again."""
    if problem.unit is None:
        return False
    rows = {row_path(name, problem.unit) for name in ROW_ARRAYS}
    return problem.path.removeprefix(copy_path("")) not in rows
