"""Repair: put right what `verify` found, and nothing else.

What planning wrote is restored from its copy, or the copy from it, whichever has the recorded
digest; the head comes from the base. Damaged or missing hidden states are computed again from the
tokens in the store. The corpus is never needed.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carryon.cache.base.model import Base, read_head
from carryon.cache.errors import CarryOnError, DamagedStoreError, StoreError
from carryon.cache.extraction.describe import forward_facts
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.resume import refuse_other_base, refuse_other_forward
from carryon.cache.files import sweep_partials, write_file
from carryon.cache.format.arrays import array_info, read_chunk
from carryon.cache.format.head_arrays import encode_head
from carryon.cache.format.manifest import (
    Manifest,
    manifest_path,
    parse_manifest,
    read_manifest,
    sha256_hex,
)
from carryon.cache.format.receipt import read_receipt
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    copy_path,
    is_mirrored,
    receipt_path,
    row_path,
)
from carryon.cache.lock import write_lock
from carryon.cache.store.top_blocks import block_files
from carryon.cache.store.verify import Problem, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairReport:
    """What a repair did."""

    store: str
    problems: list[Problem]
    """What was wrong before."""
    restored_files: list[str]
    """Planned files that were restored."""
    computed_units: list[int]
    """Units whose hidden states were computed again."""
    is_complete: bool
    """Whether a full verification afterwards found nothing wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def repair(root: Path, *, load_base: Callable[[Manifest], Base], batch_tokens: int) -> RepairReport:
    """Verify the store at `root` in full and put right what is wrong.

    Killed at any instant, the same call goes on.

    Args:
        root: of the store.
        load_base: called only if states or head must be made again.
        batch_tokens: tokens in one forward pass.

    Raises:
        MissingError: there is no store.
        DamagedStoreError: a planned file and its copy are both damaged; names it.
        SettingMismatchError: the base is not the one of the store, or computes otherwise;
            nothing was computed.
        StoreBusyError: another process writes to the store.
    """
    if not (manifest_path(root).exists() or (root / copy_path("zarr.json")).exists()):
        read_manifest(root)  # raises: there is nothing to repair
    with write_lock(root):
        sweep_partials(root)
        restored = _restore_manifest(root)
        manifest = read_manifest(root)
        problems = verify(root, depth="full").problems
        for problem in problems:
            if problem.path == "probe":  # every file is as written, and yet it means nothing
                raise DamagedStoreError(problem.text)
        restored += _restore_planned(root, manifest, problems)
        head_paths = [problem.path for problem in problems if not is_mirrored(problem.path)]
        units = sorted(
            {each.unit for each in problems if each.unit is not None and _is_of_states(each)}
        )
        if head_paths or units:
            base = load_base(manifest)
            refuse_other_base(manifest, base.identity.to_dict(), name=str(root))
            refuse_other_forward(manifest, forward_facts(base), name=str(root))
            restored += _restore_head(root, manifest, base, head_paths)
            for unit in units:
                (root / receipt_path(unit)).unlink(missing_ok=True)
            run_units(
                root, manifest, base, batch_tokens=batch_tokens, max_disk_bytes=None, units=units
            )
        after = verify(root, depth="full")
    return RepairReport(
        store=str(root),
        problems=problems,
        restored_files=restored,
        computed_units=units,
        is_complete=after.is_complete,
    )


def _restore_manifest(root: Path) -> list[str]:
    """Restore the manifest or its copy from the other; both are self-checking."""
    path, copy = manifest_path(root), root / copy_path("zarr.json")
    try:
        read_manifest(root)
    except DamagedStoreError as error:
        content = copy.read_bytes() if copy.is_file() else b""
        try:
            parse_manifest(content, name=str(copy), is_mirrored=True)
        except StoreError:
            raise DamagedStoreError(
                f"{root}: the manifest and its copy are both damaged: {error}"
            ) from error
        write_file(path, content)
        return [path.name]
    if not copy.is_file() or copy.read_bytes() != path.read_bytes():
        write_file(copy, path.read_bytes())
        return [copy.relative_to(root).as_posix()]
    return []


def _restore_planned(root: Path, manifest: Manifest, problems: Iterable[Problem]) -> list[str]:
    """Restore files of the plan, and token rows of units, from their twins."""
    restored = []
    for problem in problems:
        if _is_of_states(problem) or not is_mirrored(problem.path):
            continue
        prefix = copy_path("")
        is_copy = problem.path.startswith(prefix)
        path = problem.path.removeprefix(prefix)
        twin = path if is_copy else copy_path(path)
        if not _is_right(root, manifest, path, twin, problem.unit):
            raise DamagedStoreError(
                f"{root}: {path} and its copy are both damaged: extract into another folder"
            )
        write_file(root / problem.path, (root / twin).read_bytes())
        restored.append(problem.path)
    return restored


def _is_right(root: Path, manifest: Manifest, path: str, twin: str, unit: int | None) -> bool:
    """Tell whether the file at `twin` holds what was written as `path`."""
    if not (root / twin).is_file():
        return False
    if unit is None:
        return sha256_hex((root / twin).read_bytes()) in manifest.files.get(path, [])
    try:
        expected = read_receipt(root, manifest, unit).files[path].sha256
    except CarryOnError:
        # No receipt says what it should be; its own checksum must do.
        try:
            read_chunk(root, twin, array_info(root, path.partition("/")[0]), sha256=None)
        except DamagedStoreError:
            return False
        return True
    return sha256_hex((root / twin).read_bytes()) == expected


def _restore_head(root: Path, manifest: Manifest, base: Base, paths: list[str]) -> list[str]:
    restored: list[str] = []
    if not paths:
        return restored
    blocks = block_files(base, manifest.num_blocks)
    for path, content in (*encode_head(read_head(base)), *blocks.items()):
        if path not in paths:
            continue
        if sha256_hex(content) not in manifest.files[path]:
            raise DamagedStoreError(
                f"{root / path}: the base's head does not encode to what was written: "
                "another version of numcodecs? extract into another folder"
            )
        write_file(root / path, content)
        restored.append(path)
    return restored


def _is_of_states(problem: Problem) -> bool:
    """Tell whether the problem is mended by computing its unit again."""
    if problem.unit is None:
        return False
    rows = {row_path(name, problem.unit) for name in ROW_ARRAYS}
    return problem.path not in rows | {copy_path(path) for path in rows}
