"""A store against its own receipts: what is missing, what was changed, where.

Three depths. `quick` compares names and sizes, and checks everything small; `sample` also decodes
random chunks; `full` reads every byte and compares SHA-256. Nothing is written.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from carryon.cache.chunk import decode_chunk, shard_index
from carryon.cache.errors import CarryOnError, DamagedStoreError
from carryon.cache.layout import ROW_ARRAYS, copy_path, receipt_path, row_path, shard_path
from carryon.cache.manifest import Manifest, manifest_path, read_manifest, sha256_hex
from carryon.cache.precision import STATE_TYPES
from carryon.cache.reader import Store
from carryon.cache.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.unit_writer import read_sample_places, read_unit_input

Depth = Literal["quick", "sample", "full"]

_SAMPLED_CHUNKS = 64


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


def verify(root: Path, *, depth: Depth, seed: int = 0) -> VerifyReport:
    """Check the store at `root`.

    Args:
        root: of the store.
        depth: how much is read.
        seed: picks the chunks of depth `sample`.

    Raises:
        MissingError: there is no store.
    """
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
    for unit in tqdm(units, desc=f"verify {depth}", unit="unit", disable=depth == "quick"):
        walk.check_unit(unit, is_done=unit in done)
    if depth == "sample":
        walk.check_some_chunks(sorted(done & set(units)), seed=seed)
    if not walk.problems:
        walk.check_meaning()
    return VerifyReport(
        store=str(root),
        depth=depth,
        problems=walk.problems,
        num_files=walk.num_files,
        num_bytes=walk.num_bytes,
    )


class _Walk:
    """One pass over the files of a store, gathering problems."""

    def __init__(self, root: Path, manifest: Manifest, depth: Depth) -> None:
        self.root, self.manifest, self.depth = root, manifest, depth
        self.problems: list[Problem] = []
        self.num_files = self.num_bytes = 0

    def check_plan(self) -> None:
        """Check the manifest's copy and every file that planning wrote."""
        manifest = manifest_path(self.root)
        planned = {manifest.name: [sha256_hex(manifest.read_bytes())]} | self.manifest.files
        for path, digests in planned.items():
            self._planned(path, digests)
            if not path.startswith("head/"):
                self._planned(copy_path(path), digests)

    def check_unit(self, unit: int, *, is_done: bool) -> None:
        """Check the receipt of a unit and the files it names."""
        path = receipt_path(unit)
        if not is_done:
            problem = Problem(
                path=path, unit=unit, text="the unit is not extracted", is_missing_unit=True
            )
            self.problems.append(problem)
            return
        try:
            receipt = read_receipt(self.root, unit)
        except CarryOnError as error:
            self._note(path, unit, str(error))
            return
        self.num_files += 1
        entries = dict(receipt.files)
        for name in ROW_ARRAYS:
            entries[copy_path(row_path(name, unit))] = receipt.files[row_path(name, unit)]
        for name, entry in entries.items():
            size = self._size(name, unit=unit)
            if size is None:
                continue
            if size != entry.bytes:
                self._note(name, unit, f"expected {entry.bytes} bytes, got {size}")
            elif self.depth == "full":
                content = self._content(name, unit=unit) or b""
                if sha256_hex(content) != entry.sha256:
                    self._note(name, unit, self._where(name, receipt, content))

    def _planned(self, path: str, digests: list[str]) -> None:
        if self.depth != "full" and not path.endswith("zarr.json"):
            self._size(path, unit=None)
            return
        content = self._content(path, unit=None)
        if content is not None and sha256_hex(content) not in digests:
            self._note(path, None, "its SHA-256 is not the one that planning recorded")

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
        """Check the probe, and that receipts belong to this store's input."""
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
            if found.sha256 != read_receipt(self.root, unit).input_sha256:
                self._note(receipt_path(unit), unit, "the receipt is for other input or settings")

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
        dtype = STATE_TYPES[manifest.settings["dtype"]]
        rows = np.empty((manifest.rows_per_chunk, manifest.width), dtype=dtype)
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
        self.num_files += 1
        try:
            return (self.root / path).stat().st_size
        except FileNotFoundError:
            self._note(path, unit, "the file is missing")
            return None

    def _content(self, path: str, *, unit: int | None) -> bytes | None:
        try:
            content = (self.root / path).read_bytes()
        except FileNotFoundError:
            self._note(path, unit, "the file is missing")
            return None
        self.num_files += 1
        self.num_bytes += len(content)
        return content

    def _note(self, path: str, unit: int | None, text: str) -> None:
        problem = Problem(path=path, unit=unit, text=text)
        if problem not in self.problems:
            self.problems.append(problem)
