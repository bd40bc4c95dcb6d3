"""A folder of hidden states: which files there are, and the sample of each.

Two layouts: files by any name (vLLM's connector names them after requests), and the data set of
`speculators`, whose row I has its states in `hs_I.safetensors`.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from carryon.cache.corpus.samples import Sample, hash_id
from carryon.cache.errors import InputError, MissingError
from carryon.cache.exchange.char_ends import CharEnds
from carryon.cache.exchange.saved_rows import SavedRow, is_saved_table, read_rows
from carryon.cache.exchange.state_file import LOCK_SUFFIX, SUFFIX, FileFacts, read_ahead, read_facts
from carryon.cache.exchange.tensors import FIRST_BYTES
from carryon.cache.files.regular import names_below

logger = logging.getLogger(__name__)

STATES_FOLDER = "hidden_states"
"""Of the files, in a data set of speculators."""
_AHEAD = 64
"""Files whose starts are asked for at once."""
_ROW_FILE = re.compile(r"hs_(0|[1-9][0-9]{0,11})[.]safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class StatesFolder:
    """The files of an import; nothing but their names has been read."""

    states: Path
    """Folder with the files."""
    rows: Path | None
    """Folder of the data set whose rows they belong to. None: files by any name."""
    names: list[str]
    """Of the files, in order."""
    locks: frozenset[str]
    """Names of lock files."""


def list_folder(folder: Path, states: Path | None = None) -> StatesFolder:
    """List the files of a folder.

    Args:
        folder: that the user named.
        states: where the files of a data set's rows are. None: `hidden_states` in it.

    Raises:
        MissingError: there is no such folder.
        InputError: it holds no such files, or not those of a data set's rows; or a lock file
            lies there without its file.
    """
    if not folder.is_dir():
        raise MissingError(f"{folder}: expected a folder with files of hidden states, found none")
    has_rows = is_saved_table(folder)
    if states is not None and not has_rows:
        raise InputError(
            f"--states: expected {folder} to hold a data set of speculators (state.json), got "
            "none. Fix: leave out --states, and give the folder of the files in its place"
        )
    place = states or (folder / STATES_FOLDER if has_rows else folder)
    found = names_below(place, "")
    locks = frozenset(name for name in found if name.endswith(LOCK_SUFFIX))
    names = [name for name in found if name.endswith(SUFFIX) and not name.startswith(".")]
    known = {name + LOCK_SUFFIX for name in names}
    if lonely := sorted(name for name in locks - known if name.endswith(SUFFIX + LOCK_SUFFIX)):
        raise InputError(
            f"{place / lonely[0]}: expected the file of this lock beside it, got none: its states "
            "were never written. Fix: write it again, or remove the lock"
        )
    if not names:
        raise InputError(
            f"{place}: expected files NAME{SUFFIX}, got none. Fix: give the folder that vLLM's "
            "shared_storage_path named"
        )
    for name in names:
        if not name.isprintable() or (has_rows and not _ROW_FILE.fullmatch(name)):
            raise InputError(
                f"{place}: expected names {'hs_ROW' if has_rows else 'in printable letters'}"
                f"{SUFFIX}, got {name!a:.80}. Fix: move it elsewhere"
            )
    if others := sorted(set(found) - locks - set(names)):
        logger.warning(
            f"{place}: passed over {len(others):,} names that are not of the form NAME{SUFFIX}, "
            f"the first is {others[0]!a:.80}"
        )
    return StatesFolder(
        states=place,
        rows=folder if has_rows else None,
        names=sorted(names, key=_order) if has_rows else sorted(names),
        locks=locks,
    )


def _order(name: str) -> int:
    return int(name[3 : -len(SUFFIX)])


def read_files(
    folder: StatesFolder, *, dropped: list[str] | None = None
) -> Iterator[tuple[FileFacts, SavedRow | None]]:
    """Yield the facts of each file, with its row where the files have rows.

    Args:
        folder: of `list_folder`.
        dropped: takes the names of files that rows lack. None: these are errors.

    Raises:
        InputError: a file is missing or damaged, or is not of its row; names it.
    """
    read = partial(read_file, folder)
    if folder.rows is None:
        for number, name in enumerate(folder.names):
            _ask_ahead(folder, number)
            yield read(name), None
        return
    known = set(folder.names)
    for row in read_rows(folder.rows):
        name = f"hs_{row.number}{SUFFIX}"
        if dropped is not None and name not in known:
            dropped.append(name)
            continue
        known.discard(name)
        _ask_ahead(folder, row.number)
        facts = read(name)
        _refuse_other_row(facts, row, where=folder.states)
        yield facts, row
    if known:
        name = min(known, key=_order)
        raise InputError(
            f"{folder.states / name}: expected a row {_order(name)} in {folder.rows}, got none. "
            "Fix: give the data set that the files were written from"
        )


def _ask_ahead(folder: StatesFolder, number: int) -> None:
    """Have the starts of the next files read."""
    if number % _AHEAD == 0:
        names = folder.names[number + _AHEAD : number + 2 * _AHEAD]
        read_ahead(folder.states, names, num_bytes=FIRST_BYTES)


def read_file(folder: StatesFolder, name: str) -> FileFacts:
    """Read everything of one of the files but its states; errors of `read_facts`."""
    return read_facts(folder.states, name, is_locked=name + LOCK_SUFFIX in folder.locks)


def _refuse_other_row(facts: FileFacts, row: SavedRow, *, where: Path) -> None:
    shown = where / facts.file.name
    if len(facts.token_ids) != len(row.tokens):
        raise InputError(
            f"{shown}: expected states of the {len(row.tokens)} tokens of row {row.number}, got "
            f"{len(facts.token_ids)}. Fix: write this file again without prefix caching"
        )
    if (facts.token_ids != row.tokens).any():
        token = int(np.argmax(facts.token_ids != row.tokens))
        raise InputError(
            f"{shown}: expected the token ids of row {row.number}, got {facts.token_ids[token]} in "
            f"place of {row.tokens[token]} at token {token}. Fix: write this file again"
        )
    if facts.loss_mask is not None and (facts.loss_mask != row.loss_mask).any():
        raise InputError(
            f"{shown}: expected the loss mask of row {row.number}, got another one. Fix: write "
            "this file again"
        )


def sample_of(facts: FileFacts, row: SavedRow | None, char_ends: CharEnds | None) -> Sample:
    """Return the sample of a file: that of its row, or all of its tokens as targets.

    `char_ends` is needed where the row is not a whole sample.
    """
    if row is not None and row.more:
        return Sample(tokens=row.tokens, loss_mask=row.loss_mask, **row.more)
    assert char_ends is not None
    name = facts.file.name.removesuffix(SUFFIX) if row is None else f"row-{row.number}"
    mask = facts.loss_mask if row is None else row.loss_mask
    return Sample(
        id=name,
        tokens=facts.token_ids,
        loss_mask=np.ones(len(facts.token_ids), np.uint8) if mask is None else mask,
        char_end=char_ends(facts.token_ids),
        is_held_out=False,
        group=hash_id(name),
    )
