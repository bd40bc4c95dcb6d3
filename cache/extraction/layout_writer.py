"""Write the plan of a store: everything that is known before the base runs over the corpus.

Tokens, sample tables, head, probe, the documents of all arrays, and last the manifest, which makes
it a store. All but the head and the base's blocks is written twice, for repair. The next call
overwrites the leftovers of a killed one.
Letters: S samples.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.base.lm_head import Head
from carryon.cache.corpus.samples import SampleTable
from carryon.cache.errors import InputError, StoreBusyError, StoreError
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.extraction.sample_tables import encode_tables, refuse_known_ids
from carryon.cache.files.atomic import sync_below, write_file
from carryon.cache.files.documents import json_bytes
from carryon.cache.files.regular import read_below
from carryon.cache.format.arrays import read_file
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.head_arrays import encode_head
from carryon.cache.format.manifest import (
    Manifest,
    manifest_path,
    sha256_hex,
    write_manifest,
)
from carryon.cache.format.probe import Probe, encode_probe
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    SKIPPED_PATH,
    array_document,
    group_document,
    places,
    row_path,
)

_GROUPS = ("hidden", "samples", "head", "probe", "probe/states")
_SCALE_GROUPS = ("scale", "scale/token", "scale/channel")  # of a lossy profile


def plan_files(
    manifest: Manifest,
    samples: SampleTable,
    plan: UnitPlan,
    *,
    head: Head,
    probe: Probe,
    blocks: Mapping[str, bytes] | None = None,
    skipped: Sequence[Mapping[str, Any]] = (),
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of a new store but its manifest and hidden states.

    Args:
        manifest: of the store.
        samples: of the corpus.
        plan: where each sample lies.
        head: of the base.
        probe: of the base on this corpus.
        blocks: (path, content) of the base's last blocks.
        skipped: place and problem of each row that was left out.
    """
    yield from _unit_rows(samples, plan, manifest=manifest)
    yield from encode_head(head)
    yield from (blocks or {}).items()
    yield from encode_tables(samples, plan, manifest=manifest)
    if skipped:
        yield SKIPPED_PATH, _json_lines(skipped)
    yield from encode_probe(probe)
    yield from array_documents(manifest).items()


def write_plan(root: Path, manifest: Manifest, files: Iterable[tuple[str, bytes]]) -> Manifest:
    """Write a new store, without hidden states, from the files of its plan.

    Returns:
        The manifest as written, with the digest of each file but those of units.

    Raises:
        StoreError: there are receipts of a store whose manifest is gone; nothing was changed.
        StoreBusyError: another process has written the plan since this call began.
        DiskFullError: there is no store yet; the same call can be made again.
    """
    if units_with_receipt(root):
        raise StoreError(
            f"{root}: expected a new store, got receipts of one whose manifest is gone: "
            "run carryon repair, or choose another folder"
        )
    digests = _write(root, files, is_new=True)
    _flush(root, digests)  # before the manifest that vouches for them
    _refuse_another_planner(root)
    for path, digest in digests.items():
        if path.startswith("probe/") and sha256_hex(read_below(root, path)) != digest:
            raise _overtaken(root)
    rows = {path for path in digests if path.partition("/c/")[0] in ROW_ARRAYS}
    manifest = manifest.accepting({path: digests[path] for path in digests.keys() - rows})
    write_manifest(root, manifest)
    return manifest


def plan_bytes(sizes: Iterable[tuple[str, int]]) -> int:
    """Return the bytes of files of a plan, with their copies, from path and size of each."""
    return sum(size * len(places(path)) for path, size in sizes)


def refuse_large_plan(
    files: Iterable[tuple[str, bytes]], max_disk_bytes: int | None, *, root: Path
) -> None:
    """Check that the files of a plan are smaller than a limit.

    Raises:
        InputError: they are not.
    """
    if max_disk_bytes is None:
        return
    if (needed := plan_bytes((path, len(content)) for path, content in files)) > max_disk_bytes:
        raise InputError(
            f"max_disk: expected more than {needed / 1e6:,.1f} MB, the size of the head and the "
            f"plan of {root}, got {max_disk_bytes / 1e6:,.1f} MB"
        )


def append_plan(
    root: Path,
    old: Manifest,
    new: Manifest,
    samples: SampleTable,
    plan: UnitPlan,
    *,
    skipped: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """Add the last part of `new` to the store planned as `old`; no existing unit is changed.

    If it is killed, the store reads as before, and a second call repeats all of it: files that
    both need (array documents, the last chunk of a table) are accepted in their old and new form
    while they change.

    Raises:
        InputError: a sample's id is in the store already, or is too long for it; nothing was
            changed.
        DiskFullError: the store is as it was; the same call can be made again.
    """
    refuse_known_ids(root, old, samples)
    changed: dict[str, bytes] = {}  # files that the store has, in their new form
    digests: dict[str, str] = {}

    def added() -> Iterator[tuple[str, bytes]]:
        tables = encode_tables(samples, plan, manifest=new, root=root)
        lines = _append_lines(root, old, skipped)
        for path, content in chain(array_documents(new).items(), tables, lines):
            digests[path] = sha256_hex(content)
            if path not in old.files:
                yield path, content
            elif old.files[path] != [digests[path]]:
                changed[path] = content

    written = _write(root, chain(_unit_rows(samples, plan, manifest=new), added()))
    write_manifest(root, old.accepting({path: digests[path] for path in changed}))
    # Synced one by one: a power cut must leave the old or the new form of each.
    _write(root, changed.items(), is_synced=True)
    _flush(root, written)
    unchanged = {path: known for path, known in old.files.items() if path not in digests}
    new = replace(new, files=unchanged).accepting(digests)
    write_manifest(root, new)
    return new


def _append_lines(
    root: Path, old: Manifest, skipped: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the file of skipped rows with more lines, if there are any."""
    if skipped:
        known = SKIPPED_PATH in old.files
        before = read_file(root, SKIPPED_PATH, digests=old.files) if known else b""
        yield SKIPPED_PATH, before + _json_lines(skipped)


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(dict(row)) + "\n" for row in rows).encode("ascii")


def _write(
    root: Path,
    files: Iterable[tuple[str, bytes]],
    *,
    is_synced: bool = False,
    is_new: bool = False,
) -> dict[str, str]:
    """Write files, and the copies from which repair restores them; return the SHA-256 of each."""
    digests = {}
    for path, content in files:
        for each in places(path):
            if is_new:
                _refuse_another_planner(root)
            write_file(root / each, content, is_synced=is_synced, root=root)
        digests[path] = sha256_hex(content)
    return digests


def _refuse_another_planner(root: Path) -> None:
    """Check that nobody has written a plan since this one was begun.

    A process that shares the store may be paused until its lease expires. All planners write the
    same bytes but those of the probe, which other hardware rounds otherwise.
    """
    if manifest_path(root).exists():
        raise _overtaken(root)


def _overtaken(root: Path) -> StoreBusyError:
    return StoreBusyError(
        f"{root}: expected to write the plan alone, got one of another process, which took over. "
        "Fix: run the same command again"
    )


def _flush(root: Path, paths: Iterable[str]) -> None:
    """Flush files that `_write` wrote, and their copies, to the disk."""
    sync_below(root.parent, [root / each for path in paths for each in places(path)])


def _unit_rows(
    samples: SampleTable, plan: UnitPlan, *, manifest: Manifest
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of tokens, masks and character ends of each unit of the last part."""
    size, first_unit = manifest.unit_tokens, manifest.parts[-1].first_unit
    bounds = np.searchsorted(plan.unit, np.arange(plan.num_units + 1)).tolist()
    for unit in range(plan.num_units):
        joined = samples.join_rows(plan.order[bounds[unit] : bounds[unit + 1]])
        for name, dtype in ROW_ARRAYS.items():
            rows = np.zeros(size, dtype=dtype)
            rows[: len(joined[name])] = joined[name]  # a unit's samples leave no gap
            yield row_path(name, first_unit + unit), encode_chunk(rows)


def array_documents(manifest: Manifest) -> dict[str, bytes]:
    """Return the zarr.json of the groups and of all arrays over the token axis."""
    size, width, num_units = manifest.unit_tokens, manifest.width, manifest.num_units
    dtype, is_lossy = manifest.settings["dtype"], manifest.is_lossy
    flat: dict[str, Any] = {"shape": (num_units * size,), "chunk": (size,)}
    documents = {name: group_document() for name in (*_GROUPS, *_SCALE_GROUPS * is_lossy)}
    for name, row_dtype in ROW_ARRAYS.items():
        documents[name] = array_document(**flat, dtype=row_dtype)
    for tap in manifest.taps:
        documents[f"hidden/{tap}"] = array_document(
            shape=(num_units * size, width),
            chunk=(manifest.rows_per_chunk, width),
            shard=(size, width),
            dtype=manifest.states_dtype.name,
            attributes={"logical_dtype": dtype, "profile": manifest.settings["profile"]},
            is_raw=manifest.is_raw,
        )
        if is_lossy:
            documents[f"scale/token/{tap}"] = array_document(**flat, dtype="float32")
            documents[f"scale/channel/{tap}"] = array_document(
                shape=(num_units, width), chunk=(1, width), dtype="float32"
            )
    return {f"{name}/zarr.json": json_bytes(document) for name, document in documents.items()}
