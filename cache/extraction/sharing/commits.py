"""Commits of units that several processes may write at once: the first one wins, the others yield.

A writer puts the files of its unit beside their final names. Then it links its *commit* file, which
holds the receipt, to a name that only one can have. From there on every process can finish that
commit, in whole or the rest of it, with the same result: rename the files, write the receipt,
remove the commit file. So neither a kill nor a pause of any length leaves the files of one writer
beside the receipt of another. A commit that is found beside a receipt came too late and is removed.
"""

import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.files.atomic import PARTIAL, Content, remove_file, sync_below, write_file
from carryon.cache.files.regular import names_below, read_below, refuse_links, unsafe
from carryon.cache.format.manifest import Manifest, sha256_hex
from carryon.cache.format.receipt import (
    FileEntry,
    Receipt,
    has_receipt,
    parse_receipt,
    receipt_document,
    write_receipt,
)
from carryon.cache.format.schema import MAX_RECEIPT_BYTES
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, receipt_path, row_path, state_paths

_NAME = re.compile(r"[.](0|[1-9][0-9]{0,8})[.]commit")
_TOKEN = re.compile(rb"[0-9a-f]{16}")


def write_aside(root: Path, path: str, content: Content, *, token: str) -> None:
    """Write a file of a unit beside its final name; errors as of `write_file`."""
    write_file(root / _aside(path, token), content, root=root)


def commit_unit(root: Path, manifest: Manifest, receipt: Receipt, *, token: str) -> bool:
    """Commit a unit whose files were written aside; tell whether it was this writer's.

    If another has committed the unit, its commit is finished and the files aside are removed.

    Raises:
        InputError: the file system has no hard links.
        DiskFullError: no space left; the unit can be committed by any other.
    """
    unit = receipt.unit
    aside = root / _aside(_commit_path(unit), token)
    write_file(aside, token.encode("ascii") + b"\n" + receipt_document(receipt), root=root)
    try:
        is_first = _link(aside, root / _commit_path(unit))
    finally:
        aside.unlink(missing_ok=True)
    if is_first and not has_receipt(root, manifest, unit):
        return _carry_out(root, receipt, token)
    if is_first:  # behind a commit that is finished
        (root / _commit_path(unit)).unlink(missing_ok=True)
    discard_aside(root, manifest, unit, token=token)
    finish_commit(root, manifest, unit)
    return False


def finish_commit(root: Path, manifest: Manifest, unit: int) -> bool:
    """Finish the commit of a unit that its writer has begun; tell whether the unit has a receipt.

    A commit whose files are gone is removed: the unit has to be computed again.
    """
    try:
        content = read_below(root, _commit_path(unit), max_bytes=MAX_RECEIPT_BYTES)
    except FileNotFoundError:
        return has_receipt(root, manifest, unit)
    if has_receipt(root, manifest, unit):  # looked for after the commit was read: see above
        (root / _commit_path(unit)).unlink(missing_ok=True)
        return True
    token, _, document = content.partition(b"\n")
    try:
        receipt = parse_receipt(document, manifest, unit, name=str(root / _commit_path(unit)))
    except DamagedStoreError:
        token = b""
    if not _TOKEN.fullmatch(token):
        (root / _commit_path(unit)).unlink(missing_ok=True)
        return False
    try:
        return _carry_out(root, receipt, token.decode("ascii"))
    except FileNotFoundError:
        if has_receipt(root, manifest, unit):  # others finished, and removed what they found
            return True
        raise


def discard_aside(root: Path, manifest: Manifest, unit: int, *, token: str) -> None:
    """Remove the files of a unit that one writer has put aside."""
    for path in state_paths(manifest.taps, unit, is_lossy=manifest.is_lossy):
        (root / _aside(path, token)).unlink(missing_ok=True)


def commits_in(root: Path) -> set[int]:
    """Return the units whose commit is begun and not finished, or came too late."""
    matches = map(_NAME.fullmatch, names_below(root, "units"))
    return {int(match[1]) for match in matches if match}


def is_commit(name: str) -> bool:
    """Return whether a file in the folder of receipts is a commit."""
    return _NAME.fullmatch(name) is not None


def clear_units(root: Path, manifest: Manifest, units: Collection[int]) -> None:
    """Remove what killed writers have left of units that have a receipt."""
    for unit in units:
        (root / _commit_path(unit)).unlink(missing_ok=True)
        for path in (
            *state_paths(manifest.taps, unit, is_lossy=manifest.is_lossy),
            _commit_path(unit),
            receipt_path(unit),
        ):
            folder, _, name = path.rpartition("/")
            for each in names_below(root, folder):
                if each.startswith((f".{name}.", f"..{name}.")) and each.endswith(PARTIAL):
                    remove_file(root / folder / each)


def _carry_out(root: Path, receipt: Receipt, token: str) -> bool:
    """Give the files of a commit their names, then write its receipt; each step may be done.

    Returns:
        Whether all of its files were there.
    """
    unit = receipt.unit
    rows = {row_path(name, unit) for name in ROW_ARRAYS}
    paths = sorted(receipt.files.keys() - rows)
    for path in paths:
        refuse_links(root, (root / path).parent)
        if (root / path).is_dir() and not (root / path).is_symlink():
            raise unsafe(root / path, "a file")
        try:
            (root / _aside(path, token)).rename(root / path)
        except FileNotFoundError:
            if not _is_written(root, path, receipt.files[path]):
                (root / _commit_path(unit)).unlink(missing_ok=True)
                return False
    sync_below(root, [(root / path).parent for path in paths])
    write_receipt(root, receipt)
    (root / _commit_path(unit)).unlink(missing_ok=True)
    return True


def _is_written(root: Path, path: str, entry: FileEntry) -> bool:
    """Return whether another process has given a file its name already."""
    try:
        return sha256_hex(read_below(root, path, max_bytes=entry.bytes)) == entry.sha256
    except (FileNotFoundError, DamagedStoreError):
        return False


def _link(source: Path, target: Path) -> bool:
    """Link a file to a name, unless the name is taken; tell whether it is linked."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if source.stat().st_nlink < 2:  # on NFS an answer may be lost, and asked for again
            return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise InputError(
            f"{target.parent}: expected a file system with hard links, which several processes "
            f"need, got '{error.strerror}'. Fix: leave out --workers"
        ) from error
    sync_below(target.parent, [target.parent])
    return True


def _aside(path: str, token: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/.{name}.{token}{PARTIAL}"


def _commit_path(unit: int) -> str:
    return f"units/.{unit}.commit"
