"""Samples, and a table of them in memory-mapped Arrow files.

Letters: S samples of a table, T tokens of a sample.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

BATCH_TOKENS = 1 << 18
"""Tokens of a record batch: what a writer holds in memory."""
_ROWS = {"tokens": np.int32, "loss_mask": np.uint8, "char_end": np.int32}
ROLES = ("sample", "chosen", "rejected")
"""What the number in `Sample.role` means."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One document or conversation, or a piece of one."""

    id: str
    """Unique; of a piece, the record's id with #0, #1, ...; of a turn, with @1, @3, ..."""
    tokens: NDArray[np.int32]
    """[T] int32."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the token is a training target."""
    char_end: NDArray[np.int32]
    """[T] int32: end of the token in the record's text, in characters (code points). Never
    decreases; a token that is only some bytes of a character ends where the character ends. The
    text is the rendered conversation, or prompt + completion, or the text."""
    is_held_out: bool
    group: int = 0
    """64-bit hash of the record's id: equal for all samples of one record."""
    role: int = 0
    """Index in ROLES; chosen and rejected are the halves of a preference pair."""


def hash_id(identifier: str) -> int:
    """Return the 64-bit hash of an id."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def digest_sample(sample: Sample) -> bytes:
    """Return the SHA-256 of everything in a sample."""
    name = sample.id.encode()
    sizes = (len(name), len(sample.tokens), sample.is_held_out, sample.group, sample.role)
    digest = hashlib.sha256(struct.pack("<HQ?QB", *sizes))
    digest.update(name)
    for row, dtype in _ROWS.items():
        digest.update(getattr(sample, row).astype(dtype, copy=False).tobytes())
    return digest.digest()


class SampleWriter:
    """Writes samples to an Arrow file (IPC stream), a batch at a time; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file."""
        import pyarrow

        lists = [(name, pyarrow.list_(pyarrow.from_numpy_dtype(_ROWS[name]))) for name in _ROWS]
        fields = [("id", pyarrow.string()), *lists, ("is_held_out", pyarrow.bool_())]
        fields += [("group", pyarrow.uint64()), ("role", pyarrow.uint8())]
        self._schema = pyarrow.schema([*fields, ("digest", pyarrow.binary(32))])
        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)
        self._batch: list[Sample] = []
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._stream.close()
        self._file.close()

    def write(self, sample: Sample) -> None:
        """Add a sample."""
        self._batch.append(sample)
        self._num_tokens += len(sample.tokens)
        if self._num_tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._batch:
            return
        import pyarrow

        batch = self._batch
        offsets = np.cumsum([0, *(len(sample.tokens) for sample in batch)], dtype=np.int32)
        columns: list[Any] = [pyarrow.array([sample.id for sample in batch], pyarrow.string())]
        for name, dtype in _ROWS.items():
            values = np.concatenate([getattr(sample, name) for sample in batch])
            values = pyarrow.array(values.astype(dtype, copy=False))
            columns.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values))
        columns.append(pyarrow.array([sample.is_held_out for sample in batch], pyarrow.bool_()))
        columns.append(pyarrow.array([sample.group for sample in batch], pyarrow.uint64()))
        columns.append(pyarrow.array([sample.role for sample in batch], pyarrow.uint8()))
        columns.append(pyarrow.array(list(map(digest_sample, batch)), pyarrow.binary(32)))
        self._stream.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self._batch, self._num_tokens = [], 0


class SampleTable(Sequence[Sample]):
    """Samples in the order of the data, read from memory-mapped Arrow files when they are used."""

    def __init__(self, batches: Sequence[Any]) -> None:
        """Keep record batches of the schema of `SampleWriter`."""
        self._batches = [batch for batch in batches if batch.num_rows]
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._rows = {name: [_list_values(x, name) for x in self._batches] for name in _ROWS}
        self._offsets = [_list_offsets(batch) for batch in self._batches]

    @classmethod
    def open(cls, paths: Iterable[Path]) -> "SampleTable":
        """Map files that `SampleWriter` wrote."""
        import pyarrow

        batches: list[Any] = []
        for path in paths:
            batches.extend(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path), "r")))
        return cls(batches)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "SampleTable":
        """Return a table of samples in memory."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:  # the map outlives the name of the file
            path = Path(folder) / "samples.arrow"
            with SampleWriter(path) as writer:
                for sample in samples:
                    writer.write(sample)
            return cls.open([path])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[S] int32 tokens of each sample."""
        return np.concatenate([np.empty(0, np.int32), *map(np.diff, self._offsets)])

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """[S] whether a sample is held out."""
        return self._column("is_held_out", np.bool_)

    @property
    def groups(self) -> NDArray[np.uint64]:
        """[S] uint64: equal for all samples of one record."""
        return self._column("group", np.uint64)

    @property
    def roles(self) -> NDArray[np.uint8]:
        """[S] uint8: index in ROLES."""
        return self._column("role", np.uint8)

    def digest(self) -> str:
        """Return the SHA-256, hex, over all samples in order."""
        digest = hashlib.sha256()
        for batch in self._batches:
            digest.update(b"".join(batch.column("digest").to_pylist()))
        return digest.hexdigest()

    def ids(self, indices: Sequence[int]) -> list[str]:
        """Return the ids of samples."""
        import pyarrow

        columns = pyarrow.chunked_array([batch.column("id") for batch in self._batches])
        names: list[str] = columns.take(pyarrow.array(indices, pyarrow.int64())).to_pylist()
        return names

    def iter_ids(self) -> Iterable[list[str]]:
        """Yield the ids of all samples in order, some thousands at a time."""
        for batch in self._batches:
            yield batch.column("id").to_pylist()

    def join_rows(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return `tokens`, `loss_mask` and `char_end` of samples, one behind the other."""
        batches = np.searchsorted(self._first, indices, side="right") - 1
        starts, lengths = self._places
        starts = starts[indices]
        stops = starts + lengths[indices]
        places = list(zip(batches.tolist(), starts.tolist(), stops.tolist(), strict=True))
        return {
            name: np.concatenate(
                [np.empty(0, _ROWS[name]), *(rows[x][start:stop] for x, start, stop in places)]
            )
            for name, rows in self._rows.items()
        }

    @cached_property
    def _places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """First row of each sample in its batch, and its tokens, [S] int32 each."""
        starts = [offsets[:-1] for offsets in self._offsets]
        return np.concatenate([np.empty(0, np.int32), *starts]), self.lengths

    def longest_id(self) -> int:
        """Return the bytes of the longest id, in UTF-8."""
        from pyarrow import compute

        columns = (batch.column("id").cast("binary") for batch in self._batches)
        longest = (compute.max(compute.binary_length(column)).as_py() for column in columns)
        return max(longest, default=0)

    def __len__(self) -> int:
        """Return S."""
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """Read one sample; its arrays are views of the file, not writable."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected a sample from 0 to {len(self) - 1}, got {index}")
        number, row = self._place(index % len(self))
        batch = self._batches[number]
        start, stop = self._offsets[number][row : row + 2].tolist()
        return Sample(
            id=batch.column("id")[row].as_py(),
            **{name: rows[number][start:stop] for name, rows in self._rows.items()},
            is_held_out=batch.column("is_held_out")[row].as_py(),
            group=batch.column("group")[row].as_py(),
            role=batch.column("role")[row].as_py(),
        )

    def _place(self, index: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self._first, index, side="right")) - 1
        return batch, index - int(self._first[batch])

    def _column(self, name: str, dtype: Any) -> NDArray[Any]:  # noqa: ANN401
        columns = [x.column(name).to_numpy(zero_copy_only=False) for x in self._batches]
        return np.concatenate([np.empty(0, dtype), *columns])


def _list_offsets(batch: Any) -> NDArray[np.int32]:  # noqa: ANN401
    offsets: NDArray[np.int32] = batch.column("tokens").offsets.to_numpy()
    return offsets


def _list_values(batch: Any, name: str) -> NDArray[Any]:  # noqa: ANN401
    values: NDArray[Any] = batch.column(name).values.to_numpy()
    return values
