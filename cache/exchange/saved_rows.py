"""The rows of a data set that `speculators` prepared: token ids and loss masks, as Arrow files.

`save_to_disk` of `datasets` wrote them: columns `input_ids` and `loss_mask`, lists of whole
numbers. Rows that `carryon export speculators` wrote have more columns: what else a sample is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.reading.batches import arrow_batches
from carryon.cache.corpus.reading.saved_sets import saved_files, saved_kind
from carryon.cache.corpus.records import check_id
from carryon.cache.corpus.samples import ROLES
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

TOKENS, MASK, CHAR_END = "input_ids", "loss_mask", "char_end"
SAMPLE_COLUMNS = ("id", CHAR_END, "is_held_out", "group", "role")
"""Columns beside token ids and loss mask that make a row a whole sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedRow:
    """A row of the data set."""

    number: int
    """From 0 on; the states of the row are in the file of this number."""
    tokens: NDArray[np.int32]
    """[T]."""
    loss_mask: NDArray[np.uint8]
    """[T]: 1 where the token is a training target."""
    more: dict[str, Any]
    """Values of SAMPLE_COLUMNS, where the rows have them all; else empty."""


def is_saved_table(folder: Path) -> bool:
    """Tell whether a folder holds one saved data set."""
    return folder.is_dir() and saved_kind(folder) == "table"


def read_rows(folder: Path) -> Iterator[SavedRow]:
    """Yield the rows of a saved data set in order; a record batch is in memory at a time.

    Raises:
        InputError: a file is damaged, or a row is not token ids and a mask of their length; names
            it.
    """
    import pyarrow

    number = 0
    for path in saved_files(folder):
        try:
            for batch in arrow_batches(path):
                batch.validate(full=True)
                yield from _rows(batch, number, where=folder)
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: expected an Arrow file of a saved data set, got a damaged one ({error}). "
                "Fix: prepare the data set again"
            ) from error


def _rows(batch: "RecordBatch", first: int, *, where: Path) -> Iterator[SavedRow]:
    names = batch.schema.names
    if not {TOKENS, MASK} <= set(names) or len(set(names)) < len(names):
        raise InputError(
            f"{where}: expected columns {TOKENS} and {MASK}, one each, got "
            f"{' '.join(names)!a:.80}. Fix: "
            "give a data set that speculators prepared"
        )
    has_more = set(SAMPLE_COLUMNS) <= set(names)
    kept = [TOKENS, MASK, *(SAMPLE_COLUMNS if has_more else ())]
    columns = {name: batch.column(name) for name in kept}
    for row in range(batch.num_rows):
        shown = f"{where}: row {first + row}"
        tokens = _whole(columns[TOKENS][row], 0, (1 << 31) - 1, what=f"{shown}: {TOKENS}")
        mask = _whole(columns[MASK][row], 0, 1, what=f"{shown}: {MASK}")
        if len(mask) != len(tokens) or not len(tokens):
            raise InputError(
                f"{shown}: expected a loss mask of its {len(tokens)} tokens, 1 or more, got one "
                f"of {len(mask)}. Fix: prepare the data set again"
            )
        yield SavedRow(
            number=first + row,
            tokens=tokens.astype(np.int32),
            loss_mask=mask.astype(np.uint8),
            more=_more(columns, row, len(tokens), shown=shown) if has_more else {},
        )


def _more(columns: dict[str, Any], row: int, num_tokens: int, *, shown: str) -> dict[str, Any]:
    values = {name: columns[name][row].as_py() for name in SAMPLE_COLUMNS if name != CHAR_END}
    ends = _whole(columns[CHAR_END][row], 0, (1 << 31) - 1, what=f"{shown}: {CHAR_END}")
    kinds = {"id": str, "is_held_out": bool, "group": int, "role": int}
    is_sound = (
        all(type(values[name]) is kind for name, kind in kinds.items())
        and 0 <= values["group"] < 1 << 64
        and 0 <= values["role"] < len(ROLES)
        and len(ends) == num_tokens
        and bool((np.diff(ends) >= 0).all())
    )
    if not is_sound:
        raise InputError(
            f"{shown}: expected {' '.join(SAMPLE_COLUMNS)} of a sample, got other values. Fix: "
            "export the store again"
        )
    check_id(values["id"], where=f"{shown}: id")
    return values | {CHAR_END: ends.astype(np.int32)}


def _whole(value: Any, least: int, most: int, *, what: str) -> NDArray[np.int64]:  # noqa: ANN401
    """Return a cell that is a list of whole numbers, [T] int64."""
    import pyarrow

    items = getattr(value, "values", None)
    if not isinstance(items, pyarrow.Array) or not pyarrow.types.is_integer(items.type):
        raise InputError(
            f"{what}: expected a list of whole numbers, got {value.type!s:.40}. Fix: prepare the "
            "data set again"
        )
    if items.null_count:
        raise InputError(f"{what}: expected numbers, got a null. Fix: prepare the data set again")
    numbers: NDArray[np.int64] = items.to_numpy(zero_copy_only=False)
    if len(numbers) and not least <= int(numbers.min()) <= int(numbers.max()) <= most:
        wrong = int(numbers.min()) if numbers.min() < least else int(numbers.max())
        raise InputError(
            f"{what}: expected {least} to {most}, got {wrong}. Fix: prepare the data set again"
        )
    return numbers
