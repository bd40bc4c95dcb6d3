"""Recoding: a copy of a store in another profile, made without its base.

The copy has the same samples in the same rows, the same head, probe, blocks and marks, and the
receipts say what computed its states. `exact` and `raw` hold the same bits, and a copy of either
in the other is, file for file, what extraction would have written. The plan is written first, then
unit after unit, each committed by its receipt, so the same call resumes.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import DamagedStoreError, InputError, SettingMismatchError
from carryon.cache.extraction.layout_writer import array_documents, write_plan
from carryon.cache.extraction.pilot import PILOT_TOKENS, profile_errors
from carryon.cache.extraction.plan import refuse_foreign_folder
from carryon.cache.files.atomic import Content, sweep_partials, write_file
from carryon.cache.files.regular import read_below
from carryon.cache.format.arrays import read_file
from carryon.cache.format.manifest import (
    ROUNDED,
    Manifest,
    manifest_path,
    read_manifest,
    sha256_hex,
)
from carryon.cache.format.quantization import STEPS
from carryon.cache.format.receipt import has_receipt, write_receipt
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, row_path, state_paths
from carryon.cache.lock import write_lock
from carryon.cache.progress import Progress
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import UnitInputs, write_states
from carryon.cache.store.sizes import UnitSizes, file_bytes, raw_bytes

logger = logging.getLogger(__name__)

_MEASURED_TOKENS = 2 * PILOT_TOKENS
"""Tokens whose states predict bytes and give the error of a lossy profile, as in a pilot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecodeReport:
    """Summary of a recoding."""

    store: str
    """The copy."""
    fingerprint: str
    profile: str
    num_tokens: int
    num_units: int
    recoded_units: int
    """Units written by this call; the others were there."""
    raw_bytes: int
    """Of all hidden states, uncompressed."""
    stored_bytes: int
    """Of all hidden states in the copy, with the scales of a lossy profile."""
    elapsed_s: float


def recode(store: str | Path, *, out: str | Path, profile: str) -> RecodeReport:
    """Write a copy of a store in another profile; the same call resumes.

    Args:
        store: folder of a finished store.
        out: a new folder, or one that the same recoding was interrupted in.
        profile: of the copy: `exact`, `raw`, `near` or `compact`. Of a lossy store only a raw copy
            is made, whose manifest says whose rounding its states have.

    Raises:
        InputError: the store or profile cannot be used, or `out` holds other things; nothing was
            written.
        UnfinishedStoreError: units of the store are missing.
        SettingMismatchError: `out` holds another store; nothing was changed.
        DamagedStoreError: a file of the store is not what was written.
        StoreBusyError: another process writes to `out`.
        DiskFullError: units that are written are kept; the same call resumes.
    """
    started_at = time.perf_counter()
    source, root = Store.open(store, allow_aligned=True), Path(out)
    _refuse(source, root, profile)
    first = _first_states(source)
    manifest = _recoded_manifest(source, profile, first)
    with write_lock(root):
        sweep_partials(root)
        manifest = _prepare(source, root, manifest)
        _log_prediction(source, manifest, first)
        missing = [
            unit for unit in range(manifest.num_units) if not has_receipt(root, manifest, unit)
        ]
        _recode_units(source, root, manifest, missing)
    Store.open(root, allow_aligned=True)  # documents, receipts and probe
    return RecodeReport(
        store=str(root),
        fingerprint=manifest.fingerprint,
        profile=profile,
        num_tokens=manifest.num_tokens,
        num_units=manifest.num_units,
        recoded_units=len(missing),
        raw_bytes=raw_bytes(manifest, manifest.num_tokens),
        stored_bytes=sum(
            file_bytes(root / path)
            for unit in range(manifest.num_units)
            for path in state_paths(manifest.taps, unit, is_lossy=manifest.is_lossy)
        ),
        elapsed_s=round(time.perf_counter() - started_at, 3),
    )


def _refuse(source: Store, root: Path, profile: str) -> None:
    """Check that a store can be copied in this profile to this folder."""
    settings, rounded = source.manifest.settings, source.manifest.rounded_as
    known = ("exact", "raw", *STEPS)
    if profile not in known:
        raise InputError(f"--profile: expected {', '.join(known)}, got {profile!a:.40}")
    if source.name != str(source.root):
        raise InputError(
            f"{source.name}: expected a whole store, got a part. Fix: recode {source.root}, with "
            "all its parts"
        )
    if root.resolve().is_relative_to(source.root.resolve()):
        raise InputError(f"--out: expected another folder than the store, outside it, got {root}")
    refuse_foreign_folder(root)
    if settings["profile"] == profile:
        raise InputError(
            f"--profile: expected another than the store's, got {profile}. Fix: copy the folder"
        )
    if rounded and profile != "raw":
        raise InputError(
            f"{source.root}: expected a store of exact states for --profile {profile}, got states "
            f"rounded by the profile {rounded}, which cannot be undone. Fix: --profile raw, or "
            "carryon extract again"
        )
    if profile in STEPS and settings["dtype"] != "bfloat16":
        raise InputError(
            f"{source.root}: expected states in bfloat16 for --profile {profile}, got "
            f"{settings['dtype']}. Fix: --profile exact or raw"
        )


def _first_states(source: Store) -> dict[str, NDArray[Any]]:
    """Return the states [P, D] of some tokens, by tap; not the first, which is often odd."""
    tokens = np.arange(source.receipt(0).num_tokens)[1 : 1 + _MEASURED_TOKENS]
    rows = slice(0, 1) if len(tokens) == 0 else slice(int(tokens[0]), int(tokens[-1]) + 1)
    return {tap: states[rows] for tap, states in source.read_unit(0).hidden.items()}


def _recoded_manifest(source: Store, profile: str, first: Mapping[str, NDArray[Any]]) -> Manifest:
    """Return the manifest of the copy, without its files."""
    old = source.manifest
    settings = {name: value for name, value in old.settings.items() if name != ROUNDED}
    settings["profile"] = profile
    if old.rounded_as:
        settings[ROUNDED] = old.rounded_as
    errors = {tap: dict(known) for tap, known in old.profile_error.items()}
    if profile in STEPS:
        states = {tap: widen(values) for tap, values in first.items()}
        for tap, measured in profile_errors(states, source.head(), profile=profile).items():
            known = errors.setdefault(tap, {})
            for name, value in measured.items():
                known[name] = known.get(name, 0.0) + value
    return replace(old, settings=settings, profile_error=errors, files={})


def _prepare(source: Store, root: Path, manifest: Manifest) -> Manifest:
    """Write the plan of the copy, or check that the folder holds it."""
    if not manifest_path(root).exists():
        return write_plan(root, manifest, _plan_files(source, manifest))
    known = read_manifest(root)
    if manifest.is_lossy:  # measured: the last bits differ between cores and numbers of threads
        manifest = replace(manifest, profile_error=known.profile_error)
    if replace(known, files={}) != manifest:
        raise SettingMismatchError(
            f"{root}: expected a copy of {source.root} in the profile "
            f"{manifest.settings['profile']}, got another store. Fix: choose another --out"
        )
    return known


def _plan_files(source: Store, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of the copy but its manifest and hidden states.

    The documents of arrays over the token axis are its own; all else is the store's.
    """
    old, root = source.manifest, source.root
    for unit in range(old.num_units):
        receipt = source.receipt(unit)
        for path in (row_path(name, unit) for name in ROW_ARRAYS):
            entry = receipt.files[path]
            content = read_below(root, path, max_bytes=entry.bytes)
            if sha256_hex(content) != entry.sha256:
                raise DamagedStoreError(f"{root / path}: its SHA-256 differs from the receipt")
            yield path, content
    of_profile = array_documents(old)
    for path in old.files:
        if path not in of_profile:
            yield path, read_file(root, path, digests=old.files)
    yield from array_documents(manifest).items()


def _log_prediction(source: Store, manifest: Manifest, first: Mapping[str, NDArray[Any]]) -> None:
    states = {tap: widen(each) if manifest.is_lossy else each for tap, each in first.items()}
    sizes = UnitSizes.measure(manifest, states)
    counts = (source.receipt(unit).num_tokens for unit in range(manifest.num_units))
    stored = sum(sizes.states_bytes(manifest, count) for count in counts)
    raw = raw_bytes(manifest, manifest.num_tokens)
    logger.info(f"predicted: states {stored / 1e6:,.1f} MB of {raw / 1e6:,.1f} MB raw")


def _recode_units(source: Store, root: Path, manifest: Manifest, units: list[int]) -> None:
    """Write units one after another; memory holds one."""
    inputs = UnitInputs(root, manifest)
    total = sum(inputs.num_tokens(unit) for unit in units)
    with Progress(total, name="recode", unit="tokens") as progress:
        for unit in units:
            old = source.receipt(unit)
            unit_input = inputs.read(unit)
            if unit_input.num_tokens != old.num_tokens:
                raise DamagedStoreError(
                    f"{source.root}: unit {unit}: expected {old.num_tokens} tokens, as its receipt "
                    f"says, got {unit_input.num_tokens}"
                )
            receipt = write_states(
                root,
                manifest,
                unit_input,
                source.read_unit(unit).hidden,
                elapsed_s=old.elapsed_s,
                write=partial(_write, root),
            )
            write_receipt(root, replace(receipt, versions=old.versions))
            progress.update(old.num_tokens)


def _write(root: Path, path: str, content: Content) -> None:
    write_file(root / path, content, root=root)
