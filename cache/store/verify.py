"""A store against its own receipts: what is missing, what was changed, where.

Three depths. `quick` compares names and sizes, and reads documents, receipts and probe; `sample`
also decodes random chunks; `full` reads every byte and compares SHA-256. Nothing is written.
"""

import random
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from carryon.cache.errors import CarryOnError, DamagedStoreError, StoreError
from carryon.cache.format.arrays import array_info, read_chunk
from carryon.cache.format.codec import decode_chunk, shard_index
from carryon.cache.format.manifest import (
    Manifest,
    manifest_path,
    parse_manifest,
    read_manifest,
    sha256_hex,
)
from carryon.cache.format.receipt import FileEntry, Receipt, read_receipt, units_with_receipt
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    copy_path,
    is_mirrored,
    receipt_path,
    row_path,
    shard_path,
    state_paths,
)
from carryon.cache.progress import track
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import read_sample_places, read_unit_input

Depth = Literal["quick", "sample", "full"]

_SAMPLED_CHUNKS = 64
_LARGE = ("head/lm_head/c/", "blocks/", "samples/", copy_path("samples/"))
"""Files of the plan that grow with vocabulary or samples; read by `full` only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: str
    """File, relative to the store."""
    unit: int | None
    """Unit it belongs to; None for the plan (manifest, tables, head, probe)."""
    text: str
    """What is wrong with it, naming tap and chunk where there are any."""
    is_missing_unit: bool = False
    """A unit that was never finished: not damage, but not there either."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What a verification saw."""

    store: str
    depth: Depth
    problems: list[Problem]
    num_files: int
    num_bytes: int
    """Bytes read and compared."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged; units may still be unfinished."""
        return all(problem.is_missing_unit for problem in self.problems)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is damaged and no unit is missing."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"is_sound": self.is_sound, "is_complete": self.is_complete}


def verify(path: str | Path, *, depth: Depth = "sample", seed: int = 0) -> VerifyReport:
    """Check the store at `path`.

    Args:
        path: folder of the store.
        depth: how much is read.
        seed: picks the chunks of depth `sample`.

    Raises:
        MissingError: there is no store.
    """
    root = Path(path)
    try:
        manifest = read_manifest(root)
    except DamagedStoreError as error:
        problem = Problem(path=manifest_path(root).name, unit=None, text=str(error))
        return VerifyReport(
            store=str(root), depth=depth, problems=[problem], num_files=1, num_bytes=0
        )
    walk = _Walk(root, manifest, depth)
    walk.check_plan()
    done = units_with_receipt(root)
    units = range(manifest.num_units)
    for unit in track(units, total=len(units), name=f"verify {depth}", unit="units"):
        walk.check_unit(unit, is_done=unit in done)
    if depth == "sample":
        walk.check_some_chunks(sorted(done & set(units)), seed=seed)
    walk.check_meaning()
    return VerifyReport(
        store=str(root),
        depth=depth,
        problems=walk.problems,
        num_files=len(walk.files),
        num_bytes=walk.num_bytes,
    )


class _Walk:
    """One pass over the files of a store, gathering problems."""

    def __init__(self, root: Path, manifest: Manifest, depth: Depth) -> None:
        self.root, self.manifest, self.depth = root, manifest, depth
        self.problems: list[Problem] = []
        self.files = {manifest_path(root).name}
        self.num_bytes = manifest_path(root).stat().st_size

    @property
    def is_sound(self) -> bool:
        """Whether nothing damaged was found so far."""
        return all(problem.is_missing_unit for problem in self.problems)

    def check_plan(self) -> None:
        """Check the manifest's copy and every file that planning wrote."""
        self._check_manifest_copy()
        for path, digests in self.manifest.files.items():
            self._check_planned(path, digests)
            if is_mirrored(path):
                self._check_planned(copy_path(path), digests)

    def check_unit(self, unit: int, *, is_done: bool) -> None:
        """Check the receipt of a unit and its files."""
        path, receipt = receipt_path(unit), None
        if is_done:
            receipt = self._checked_receipt(unit)
        else:
            problem = Problem(
                path=path, unit=unit, text="the unit is not extracted", is_missing_unit=True
            )
            self.problems.append(problem)
        for name in ROW_ARRAYS:
            for each in (row_path(name, unit), copy_path(row_path(name, unit))):
                if receipt is not None:
                    self._check_entry(each, receipt.files[row_path(name, unit)], receipt)
                else:
                    self._check_rows(name, each, unit)
        if receipt is None:
            return
        for each in self._state_paths(unit):
            self._check_entry(each, receipt.files[each], receipt)

    def _state_paths(self, unit: int) -> list[str]:
        is_lossy = self.manifest.is_lossy
        return state_paths(self.manifest.taps, unit, is_lossy=is_lossy)

    def _check_manifest_copy(self) -> None:
        copy = copy_path(manifest_path(self.root).name)
        content = self._content(copy, unit=None)
        if content is None:
            return
        try:
            found = parse_manifest(content, name=copy, is_mirrored=True)
        except StoreError as error:
            self._note(copy, None, str(error))
            return
        if not found.is_stage_of(self.manifest):
            self._note(copy, None, "it is the manifest of another store")

    def _check_planned(self, path: str, digests: Collection[str]) -> None:
        if self.depth != "full" and path.startswith(_LARGE):
            self._size(path, unit=None)
            return
        content = self._content(path, unit=None)
        if content is not None and sha256_hex(content) not in digests:
            self._note(path, None, "its SHA-256 is not the one that planning recorded")

    def _checked_receipt(self, unit: int) -> Receipt | None:
        path = receipt_path(unit)
        self.num_bytes += self._size(path, unit=unit) or 0
        try:
            receipt = read_receipt(self.root, self.manifest, unit)
        except CarryOnError as error:
            self._note(path, unit, str(error))
            return None
        expected = {row_path(name, unit) for name in ROW_ARRAYS}
        expected |= {*self._state_paths(unit)}
        if set(receipt.files) != expected:
            self._note(path, unit, f"expected it to name {sorted(expected)}")
            return None
        return receipt

    def _check_entry(self, path: str, entry: FileEntry, receipt: Receipt) -> None:
        """Check a file against what the receipt says of it."""
        size = self._size(path, unit=receipt.unit)
        if size is None:
            return
        if size != entry.bytes:
            self._note(path, receipt.unit, f"expected {entry.bytes} bytes, got {size}")
        elif self.depth == "full":
            content = self._content(path, unit=receipt.unit) or b""
            if sha256_hex(content) != entry.sha256:
                self._note(path, receipt.unit, self._where(path, receipt, content))

    def _check_rows(self, name: str, path: str, unit: int) -> None:
        """Check tokens, masks or character ends that no receipt speaks of yet."""
        if self._size(path, unit=unit) is None or self.depth == "quick":
            return
        try:
            read_chunk(self.root, path, array_info(self.root, name), sha256=None)
        except DamagedStoreError as error:
            self._note(path, unit, str(error).partition(": run carryon")[0])

    def check_some_chunks(self, units: list[int], *, seed: int) -> None:
        """Decode random chunks of the hidden states."""
        picks = random.Random(seed)
        per_unit = self.manifest.unit_tokens // self.manifest.rows_per_chunk
        for _ in range(min(_SAMPLED_CHUNKS, len(units) * per_unit * len(self.manifest.taps))):
            unit, number = picks.choice(units), picks.randrange(per_unit)
            tap = picks.choice(self.manifest.taps)
            path = shard_path(tap, unit)
            content = self._content(path, unit=unit)
            if content is not None and (text := self._chunk_problem(tap, content, number)):
                self._note(path, unit, text)

    def check_meaning(self) -> None:
        """Check the probe, and that receipts belong to this store's input.

        Only of a store whose files are sound: a damaged one would fail here again, less clearly.
        """
        if not self.is_sound:
            return
        try:
            Store.open(self.root, allow_unfinished=True)
        except CarryOnError as error:
            self._note("probe", None, str(error))
            return
        if self.depth != "full":
            return
        starts, lengths = read_sample_places(self.root, self.manifest)
        size = self.manifest.unit_tokens
        bounds = np.searchsorted(starts, np.arange(self.manifest.num_units + 1) * size)
        for unit in sorted(units_with_receipt(self.root) & set(range(self.manifest.num_units))):
            span = slice(bounds[unit], bounds[unit + 1])
            found = read_unit_input(
                self.root, self.manifest, unit, starts=starts[span], lengths=lengths[span]
            )
            if found.sha256 != read_receipt(self.root, self.manifest, unit).input_sha256:
                self._note(receipt_path(unit), unit, "the receipt is for other tokens or samples")

    def _where(self, path: str, receipt: Receipt, content: bytes) -> str:
        """Say which chunk of a changed file is damaged."""
        for tap in self.manifest.taps:
            if path == shard_path(tap, receipt.unit):
                for number in range(self.manifest.unit_tokens // self.manifest.rows_per_chunk):
                    if text := self._chunk_problem(tap, content, number):
                        return text
                return f"tap {tap}: its SHA-256 is not the receipt's, though every chunk decodes"
        return "its SHA-256 is not the receipt's"

    def _chunk_problem(self, tap: str, content: bytes, number: int) -> str | None:
        manifest = self.manifest
        num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
        rows = np.empty((manifest.rows_per_chunk, manifest.width), dtype=manifest.states_dtype)
        stored = memoryview(content)
        try:
            index = shard_index(stored, num_chunks=num_chunks, name=f"tap {tap}")
            offset, num_bytes = index[number]
            decode_chunk(
                stored[offset : offset + num_bytes], rows, name=f"tap {tap} chunk {number}"
            )
        except DamagedStoreError as error:
            return str(error).partition(": run carryon")[0]
        return None

    def _size(self, path: str, *, unit: int | None) -> int | None:
        self.files.add(path)
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            self._note(path, unit, "the file is missing")
            return None

    def _content(self, path: str, *, unit: int | None) -> bytes | None:
        self.files.add(path)
        try:
            content = (self.root / path).read_bytes()
        except FileNotFoundError:
            self._note(path, unit, "the file is missing")
            return None
        self.num_bytes += len(content)
        return content

    def _note(self, path: str, unit: int | None, text: str) -> None:
        problem = Problem(path=path, unit=unit, text=text)
        if problem not in self.problems:
            self.problems.append(problem)
