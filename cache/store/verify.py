"""Verify a store against its own receipts: what is missing, what was changed, and where.

Three depths. `quick` compares names and sizes, and reads documents, receipts and probe; `sample`
also decodes random chunks; `full` reads every byte and compares SHA-256. Nothing is written.
"""

import hashlib
import random
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import CarryOnError, DamagedStoreError, StoreError, UnsafePathError
from carryon.cache.files.regular import names_below, open_file_below, read_below, stat_below
from carryon.cache.format.alignment import read_num_nodes, read_trees
from carryon.cache.format.arrays import read_chunk, unit_array_info
from carryon.cache.format.codec import decode_chunk, shard_index
from carryon.cache.format.manifest import (
    MANIFEST_PATH,
    Manifest,
    manifest_path,
    parse_manifest,
    read_manifest,
    sha256_hex,
)
from carryon.cache.format.receipt import FileEntry, Receipt, read_receipt, units_with_receipt
from carryon.cache.format.schema import max_planned_bytes
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    channel_scale_path,
    copy_path,
    places,
    receipt_path,
    row_path,
    shard_path,
    state_paths,
    token_scale_path,
)
from carryon.cache.progress import track
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import check_finite, decode_shard
from carryon.cache.store.shard_writer import UnitInput, UnitInputs

Depth = Literal["quick", "sample", "full"]

_SAMPLED_CHUNKS = 64
_FEW_UNITS = 4096
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
    walk = _Walk(root, depth)
    try:
        manifest = read_manifest(root)
    except DamagedStoreError as error:
        walk.note(manifest_path(root).name, None, error)
    else:
        walk.check(manifest, seed=seed)
    return VerifyReport(
        store=str(root),
        depth=depth,
        problems=walk.problems,
        num_files=len(walk.files),
        num_bytes=walk.num_bytes,
    )


class _Walk:
    """One pass over the files of a store, gathering problems."""

    def __init__(self, root: Path, depth: Depth) -> None:
        self.root, self.depth = root, depth
        self.problems: list[Problem] = []
        self._seen: set[Problem] = set()
        self.files = {manifest_path(root).name}
        self.num_bytes = 0

    def check(self, manifest: Manifest, *, seed: int) -> None:
        """Check all files of the store, then what they mean."""
        self.manifest = manifest
        self.num_bytes += stat_below(self.root, MANIFEST_PATH).st_size
        self._check_manifest_copy()
        if not self._has_as_many_units():
            return
        for path, digests in manifest.files.items():
            for each in places(path):
                self._check_planned(each, digests)
        units = range(manifest.num_units)
        done = units_with_receipt(self.root) & set(units)
        for unit in track(units, total=len(units), name=f"verify {self.depth}", unit="units"):
            self._check_unit(unit, is_done=unit in done)
        if self.depth == "sample":
            self._check_some_chunks(sorted(done), seed=seed)
        # A damaged file would fail again here, with a text that says less.
        if all(problem.is_missing_unit for problem in self.problems):
            self._check_meaning(sorted(done))

    def note(
        self, path: str, unit: int | None, what: str | CarryOnError, *, is_missing: bool = False
    ) -> None:
        """Keep a problem."""
        text = what.problem if isinstance(what, DamagedStoreError) else str(what)
        problem = Problem(path=path, unit=unit, text=text, is_missing_unit=is_missing)
        if problem not in self._seen:
            self._seen.add(problem)
            self.problems.append(problem)

    def _check_manifest_copy(self) -> None:
        copy = copy_path(manifest_path(self.root).name)
        content = self._content(copy, unit=None)
        if content is None:
            return
        try:
            manifest = parse_manifest(content, name=copy, is_mirrored=True)
        except StoreError as error:
            self.note(copy, None, error)
            return
        if not manifest.is_stage_of(self.manifest):
            self.note(copy, None, "it is the manifest of another store")
        elif manifest.is_behind(self.manifest):
            self.note(copy, None, "it is an older manifest of this store")

    def _check_planned(self, path: str, digests: Collection[str]) -> None:
        if self.depth != "full" and path.startswith(_LARGE):
            self._size(path, unit=None)
            return
        digest = self._sha256(path, unit=None, max_bytes=max_planned_bytes(path))
        if digest is not None and digest not in digests:
            self.note(path, None, "its SHA-256 is not the one that planning recorded")

    def _check_unit(self, unit: int, *, is_done: bool) -> None:
        """Check the receipt of a unit and its files."""
        receipt = None
        if is_done:
            receipt = self._checked_receipt(unit)
        else:
            self.note(receipt_path(unit), unit, "the unit is not extracted", is_missing=True)
        for path in (row_path(name, unit) for name in ROW_ARRAYS):
            for each in places(path):
                if receipt is not None:
                    self._check_entry(each, receipt.files[path], receipt)
                elif self._size(each, unit=unit) is not None and self.depth != "quick":
                    self._check_decodes(each, path, unit)
        if receipt is not None:
            for path in self._state_paths(unit):
                self._check_entry(path, receipt.files[path], receipt)

    def _checked_receipt(self, unit: int) -> Receipt | None:
        path = receipt_path(unit)
        self.num_bytes += self._size(path, unit=unit) or 0
        try:
            receipt = read_receipt(self.root, self.manifest, unit)
        except CarryOnError as error:
            self.note(path, unit, error)
            return None
        return receipt

    def _state_paths(self, unit: int) -> list[str]:
        return state_paths(self.manifest.taps, unit, is_lossy=self.manifest.is_lossy)

    def _check_entry(self, path: str, entry: FileEntry, receipt: Receipt) -> None:
        """Compare a file with what the receipt says of it."""
        size = self._size(path, unit=receipt.unit)
        if size is None:
            return
        if size != entry.bytes:
            self.note(path, receipt.unit, f"expected {entry.bytes} bytes, got {size}")
        elif self.depth == "full":
            content = self._content(path, unit=receipt.unit) or b""
            if sha256_hex(content) != entry.sha256:
                self.note(path, receipt.unit, self._where(path, receipt.unit, content))
            else:
                self._check_values(path, content, entry, receipt)

    def _check_values(self, path: str, content: bytes, entry: FileEntry, receipt: Receipt) -> None:
        """Check what the file of a unit says: every digest can be right, and a state no number."""
        manifest, unit = self.manifest, receipt.unit
        try:
            for tap in manifest.taps:
                name = f"unit {unit} tap {tap}"
                if path == shard_path(tap, unit):
                    for states in decode_shard(content, manifest, entry.chunks, name=name):
                        if not manifest.is_lossy:
                            check_finite(states, name=name)
                elif path in (token_scale_path(tap, unit), channel_scale_path(tap, unit)):
                    scale = path.partition("/c/")[0]
                    info = unit_array_info(manifest, scale)
                    scales = read_chunk(self.root, path, info, sha256=[entry.sha256])
                    check_finite(scales, name=f"{name} scales")
        except DamagedStoreError as error:
            self.note(path, unit, error)

    def _check_decodes(self, path: str, original: str, unit: int) -> None:
        """Check tokens, masks or character ends that no receipt covers yet."""
        try:
            info = unit_array_info(self.manifest, original.partition("/")[0])
            read_chunk(self.root, path, info, sha256=None)
        except DamagedStoreError as error:
            self.note(path, unit, error)

    def _check_some_chunks(self, units: list[int], *, seed: int) -> None:
        """Decode random chunks of the hidden states."""
        picks = random.Random(seed)
        per_unit = self.manifest.unit_tokens // self.manifest.rows_per_chunk
        for _ in range(min(_SAMPLED_CHUNKS, len(units) * per_unit * len(self.manifest.taps))):
            unit, number = picks.choice(units), picks.randrange(per_unit)
            tap = picks.choice(self.manifest.taps)
            path = shard_path(tap, unit)
            content = self._content(path, unit=unit)
            if content is not None and (text := self._chunk_problem(tap, content, number)):
                self.note(path, unit, text)

    def _check_meaning(self, done: list[int]) -> None:
        """Check the probe, and at depth `full` that receipts belong to this store's input."""
        try:
            store = Store.open(self.root, allow_unfinished=True, allow_aligned=True)
        except CarryOnError as error:
            self.note("probe", None, error)
            return
        if self.depth != "full":
            return
        try:
            store.check_tables()
            inputs = UnitInputs(self.root, self.manifest)
            num_nodes = (
                read_num_nodes(self.root, self.manifest) if self.manifest.alignment else None
            )
        except CarryOnError as error:
            self.note("samples", None, error)
            return
        for unit in done:
            receipt = read_receipt(self.root, self.manifest, unit)
            try:
                found = inputs.read(unit)
            except DamagedStoreError as error:
                self.note(row_path("tokens", unit), unit, error)
                continue
            if (found.sha256, found.num_tokens) != (receipt.input_sha256, receipt.num_tokens):
                self.note(receipt_path(unit), unit, "the receipt is for other tokens or samples")
            if num_nodes is not None:
                self._check_trees(found, num_nodes)

    def _check_trees(self, unit: UnitInput, num_nodes: NDArray[np.int32]) -> None:
        """Check the trees of an aligned store: every file can be as written, and point nowhere."""
        sizes = num_nodes[unit.first_sample : unit.first_sample + len(unit.lengths)]
        try:
            read_trees(
                self.root,
                self.manifest,
                unit.unit,
                num_nodes=sizes,
                starts=unit.starts,
                lengths=unit.lengths,
            )
        except DamagedStoreError as error:
            self.note("samples", None, error)

    def _where(self, path: str, unit: int, content: bytes) -> str:
        """Say which chunk of a changed file is damaged."""
        for tap in self.manifest.taps:
            if path == shard_path(tap, unit):
                for number in range(self.manifest.unit_tokens // self.manifest.rows_per_chunk):
                    if text := self._chunk_problem(tap, content, number):
                        return text
                return f"tap {tap}: its SHA-256 is not the receipt's, though every chunk decodes"
        return "its SHA-256 is not the receipt's"

    def _chunk_problem(self, tap: str, content: bytes, number: int) -> str | None:
        manifest, stored = self.manifest, memoryview(content)
        num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
        rows = np.empty((manifest.rows_per_chunk, manifest.width), dtype=manifest.states_dtype)
        try:
            offset, size = shard_index(stored, num_chunks=num_chunks, name=f"tap {tap}")[number]
            chunk, name = stored[offset : offset + size], f"tap {tap} chunk {number}"
            decode_chunk(chunk, rows, name=name, is_raw=manifest.is_raw)
        except DamagedStoreError as error:
            return error.problem
        return None

    def _size(self, path: str, *, unit: int | None) -> int | None:
        self.files.add(path)
        try:
            return stat_below(self.root, path).st_size
        except FileNotFoundError:
            self.note(path, unit, "the file is missing")
        except UnsafePathError as error:
            self.note(path, unit, error)
        return None

    def _sha256(self, path: str, *, unit: int | None, max_bytes: int) -> str | None:
        """Return the digest of a file, without holding all of it."""
        size = self._size(path, unit=unit)
        if size is None:
            return None
        if size > max_bytes:
            return "too large"
        self.num_bytes += size
        with open_file_below(self.root, path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _has_as_many_units(self) -> bool:
        """Tell whether there are about as many units as the manifest says: else noted.

        Each unit is looked at, and there may be a billion of which no file exists.
        """
        places = ("tokens/c", copy_path("tokens/c"))
        most = 0
        for place in places:
            with suppress(UnsafePathError):  # noted with the first file in it
                most = max(most, len(names_below(self.root, place)))
        if self.manifest.num_units <= max(2 * most, _FEW_UNITS):
            return True
        text = f"expected files of {self.manifest.num_units} units, got those of {most}"
        self.note(MANIFEST_PATH, None, text)
        return False

    def _content(self, path: str, *, unit: int | None) -> bytes | None:
        size = self._size(path, unit=unit)
        if size is None:
            return None
        self.num_bytes += size
        return read_below(self.root, path)
