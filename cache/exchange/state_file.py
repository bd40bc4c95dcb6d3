"""One file of hidden states, as vLLM's connector writes it for a request: checked, then read.

`hidden_states` [T, L, D] and `token_ids` [T]; perhaps `loss_mask` [T]. Beside it may lie a `.lock`
file that the writer holds until the file is whole.
Letters: T tokens, L layers, D base width.
"""

import fcntl
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError, UnsafePathError
from carryon.cache.exchange.tensors import ITEM_BYTES, Header, TensorPlace, read_header
from carryon.cache.files.regular import open_below
from carryon.cache.store.shard_reader import is_finite

STATE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""dtype of states in files -> name in a store."""
SUFFIX = ".safetensors"
LOCK_SUFFIX = ".lock"
STATES, TOKENS, MASK = "hidden_states", "token_ids", "loss_mask"
_ARRAY_TYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_ARRAY_TYPES["BOOL"] = "u1"
_WHOLE = ("I64", "I32", "U8", "BOOL")
_MAX_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFile:
    """Where the states lie in a file; the file as it was when the import was planned."""

    name: str
    """Relative to the folder of the files."""
    num_bytes: int
    header_bytes: int
    header_crc: int
    first: int
    """Of the states' bytes, counted from the start of the file."""
    tokens: TensorPlace


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """What planning reads of a file."""

    file: StateFile
    shape: tuple[int, int, int]
    """(T, L, D)."""
    dtype: str
    """Of the states, as in a store."""
    token_ids: NDArray[np.int32]
    """[T]."""
    loss_mask: NDArray[np.uint8] | None
    """[T], where the file has one."""
    layer_ids: tuple[int, ...] | None
    """Of each column, where the file names them."""
    digest: bytes
    """SHA-256 of the header and the token ids. States are left out: a file that was wrong may be
    written again while its unit is still to come."""


def read_facts(root: Path, name: str, *, is_locked: bool) -> FileFacts:
    """Read everything of a file but its states.

    Args:
        root: folder of the files.
        name: of the file, relative to `root`.
        is_locked: whether a lock file lies beside it.

    Raises:
        InputError: it is missing, cut off, damaged or still being written; names it.
        UnsafePathError: it is no regular file.
    """
    shown = str(root / name)
    if is_locked:
        _refuse_writer(root, name)
    try:
        handle = open_below(root, name)
    except FileNotFoundError as error:
        raise InputError(
            f"{shown}: expected a file of hidden states, got none. Fix: write this file again"
        ) from error
    try:
        header, start = read_header(handle, name=shown)
        size = os.fstat(handle).st_size
        states, tokens, mask = _places(header, name=shown)
        token_ids = _read(handle, start, tokens, name=shown)
        loss_mask = None if mask is None else _read(handle, start, mask, name=shown)
    finally:
        os.close(handle)
    _check_range(token_ids, 0, (1 << 31) - 1, what=f"{shown}: {TOKENS}")
    if loss_mask is not None:
        _check_range(loss_mask, 0, 1, what=f"{shown}: {MASK}")
    digest = hashlib.sha256(header.content)
    digest.update(token_ids.tobytes())
    num_tokens, num_layers, width = states.shape
    return FileFacts(
        file=StateFile(
            name=name,
            num_bytes=size,
            header_bytes=len(header.content),
            header_crc=zlib.crc32(header.content),
            first=states.first,
            tokens=tokens,
        ),
        shape=(num_tokens, num_layers, width),
        dtype=STATE_DTYPES[states.dtype],
        token_ids=token_ids.astype(np.int32),
        loss_mask=None if loss_mask is None else loss_mask.astype(np.uint8),
        layer_ids=_layer_ids(header, name=shown),
        digest=digest.digest(),
    )


def read_ahead(root: Path, names: Iterable[str], *, num_bytes: int = 0) -> None:
    """Ask the system to read the first bytes of files, or all of them, while other work goes on.

    One small file after another, each read would wait for the disk. What is wrong with a file is
    said by the one that reads it.
    """
    for name in names:
        with suppress(OSError, UnsafePathError):
            handle = open_below(root, name)
            try:
                os.posix_fadvise(handle, 0, num_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)


def _refuse_writer(root: Path, name: str) -> None:
    """Check that no process holds the lock file of a file."""
    try:
        handle = open_below(root, name + LOCK_SUFFIX)
    except FileNotFoundError:
        return  # removed since the folder was listed: the file is finished
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{root / name}: expected a finished file, got one that another process is writing. "
            "Fix: wait for it, then run the same command"
        ) from error
    finally:
        os.close(handle)


def _places(header: Header, *, name: str) -> tuple[TensorPlace, TensorPlace, TensorPlace | None]:
    """Return the places of states, token ids and loss mask; their shapes agree."""
    tensors = header.tensors
    for key in (STATES, TOKENS):
        if key not in tensors:
            raise InputError(
                f"{name}: expected the tensors {STATES} and {TOKENS}, got no {key}. Fix: give "
                "files of vLLM's hidden states connector"
            )
    if unknown := sorted(tensors.keys() - {STATES, TOKENS, MASK}):
        raise InputError(
            f"{name}: expected the tensors {STATES}, {TOKENS} and perhaps {MASK}, got also "
            f"{unknown[0]!a:.80}, which may change their meaning. Fix: write the files without it"
        )
    states, tokens, mask = tensors[STATES], tensors[TOKENS], tensors.get(MASK)
    if len(states.shape) != 3 or not all(states.shape) or states.shape[0] > _MAX_TOKENS:
        raise InputError(
            f"{name}: {STATES}: expected [tokens, layers, width], got shape {list(states.shape)}. "
            "Fix: give files of vLLM's hidden states connector"
        )
    if states.dtype not in STATE_DTYPES:
        raise InputError(
            f"{name}: {STATES}: expected {' or '.join(STATE_DTYPES)}, got {states.dtype}. Fix: "
            "write the files in one of these"
        )
    for key, place in ((TOKENS, tokens), (MASK, mask)):
        if place is None:
            continue
        if place.shape != states.shape[:1]:
            raise InputError(
                f"{name}: expected states of each of the {list(place.shape)} values of {key}, got "
                f"{states.shape[0]} rows: a prefix cache can leave out rows. Fix: write this file "
                "again without prefix caching"
            )
        if place.dtype not in _WHOLE:
            raise InputError(
                f"{name}: {key}: expected whole numbers, got {place.dtype}. Fix: give files of "
                "vLLM's hidden states connector"
            )
    return states, tokens, mask


def _layer_ids(header: Header, *, name: str) -> tuple[int, ...] | None:
    text = header.metadata.get("layer_ids")
    if text is None:
        return None
    words = text.split()
    if not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        raise InputError(
            f"{name}: layer_ids: expected whole numbers, got {text!a:.80}. Fix: write the file "
            "without it, and give --layer-ids"
        )
    return tuple(map(int, words))


def _read(handle: int, start: bytes, place: TensorPlace, *, name: str) -> NDArray[Any]:
    """Return a tensor [T] of an open file, whose first bytes are `start`."""
    is_near = place.stop <= len(start)
    size = place.stop - place.first
    content = start[place.first : place.stop] if is_near else os.pread(handle, size, place.first)
    if len(content) < size:
        raise InputError(
            f"{name}: expected a finished file, got one that became shorter while it was read. "
            "Fix: run the same command once nobody writes to the folder"
        )
    return np.frombuffer(content, dtype=_ARRAY_TYPES[place.dtype])


def _check_range(values: NDArray[Any], least: int, most: int, *, what: str) -> None:
    if len(values) and not least <= int(values.min()) <= int(values.max()) <= most:
        wrong = int(values.min()) if values.min() < least else int(values.max())
        raise InputError(
            f"{what}: expected {least} to {most}, got {wrong}. Fix: write this file again"
        )


def read_states(
    root: Path,
    file: StateFile,
    *,
    token_ids: NDArray[np.int32],
    shape: tuple[int, int],
    dtype: str,
    memory: NDArray[np.uint8],
) -> NDArray[Any]:
    """Read the states of a file, [T, L, D]; uint16 holds bits of bfloat16.

    Args:
        root: folder of the files.
        file: as it was planned.
        token_ids: [T] that it must have.
        shape: (L, D).
        dtype: of the states, as in a store.
        memory: of at least `file.num_bytes`; the result is a view of it.

    Raises:
        InputError: the file is missing or was changed, a state is not finite, or two columns are
            equal; names it.
    """
    shown = str(root / file.name)
    try:
        handle = open_below(root, file.name)
    except FileNotFoundError as error:
        raise InputError(
            f"{shown}: expected the file that was there before, got none. Fix: put it back"
        ) from error
    try:
        view = memory.data[: file.num_bytes]
        got = 0
        while got < len(view) and (more := os.preadv(handle, [view[got:]], got)):
            got += more
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    place = file.tokens
    is_same = (
        got == size == file.num_bytes
        and zlib.crc32(view[: file.header_bytes]) == file.header_crc
        and np.array_equal(
            memory[place.first : place.stop].view(_ARRAY_TYPES[place.dtype]), token_ids
        )
    )
    if not is_same:
        raise InputError(
            f"{shown}: expected the file as it was when the import began, got another one. Fix: "
            "run the same command once nobody writes to the folder"
        )
    stop = file.first + len(token_ids) * shape[0] * shape[1] * ITEM_BYTES[_written(dtype)]
    states = memory[file.first : stop].view(_ARRAY_TYPES[_written(dtype)])
    states = states.reshape(len(token_ids), *shape)
    _refuse_not_finite(states, name=shown)
    _refuse_equal_columns(states, name=shown)
    return states


def _written(dtype: str) -> str:
    return next(written for written, name in STATE_DTYPES.items() if name == dtype)


def _refuse_not_finite(states: NDArray[Any], *, name: str) -> None:
    is_sound = is_finite(states)
    if not is_sound.all():
        token, column, _ = np.argwhere(~is_sound)[0].tolist()
        raise InputError(
            f"{name}: expected finite states, got one that is not, at token {token} in column "
            f"{column}. Fix: write this file again, or leave it out"
        )


def _refuse_equal_columns(states: NDArray[Any], *, name: str) -> None:
    """Check that no two of the L columns are equal: a mark of a layer id that no block has."""
    first_rows: Sequence[bytes] = [row.tobytes() for row in states[0]]
    for second, row in enumerate(first_rows):
        first = first_rows.index(row)
        if first < second and np.array_equal(states[:, first], states[:, second]):
            raise InputError(
                f"{name}: expected the states of different layers, got equal columns {first} and "
                f"{second}: vLLM repeats another layer where an id is out of range. Fix: write the "
                "files again with ids in range"
            )
