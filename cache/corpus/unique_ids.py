"""Check that no two samples have one id, with the places of the records if they do."""

import re
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from carryon.cache.corpus.files import read_shard
from carryon.cache.corpus.records import read_record
from carryon.cache.corpus.rows import Row, Shard
from carryon.cache.corpus.samples import SampleTable, hash_id
from carryon.cache.errors import InputError


def refuse_equal_ids(table: SampleTable, shards: Sequence[Shard]) -> None:
    """Refuse samples of one id; 8 bytes a sample are in memory."""
    hashes = np.fromiter(
        (hash_id(name) for names in table.iter_ids() for name in names), np.uint64, len(table)
    )
    ordered = np.sort(hashes)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    known: set[str] = set()
    for name in (name for names in table.iter_ids() for name in names if twice):
        if name in known:
            first, second = _places_of(name, shards)
            raise InputError(
                f"{second}: id {name!r}: expected a different one for each sample, got that of a "
                f"sample of {first}. Fix: change it, or leave out all ids"
            )
        if hash_id(name) in twice:
            known.add(name)


def _places_of(name: str, shards: Sequence[Shard]) -> tuple[str, str]:
    """Return the places of the two records that have samples of this id, reading them again."""
    places = []
    for row in (row for shard in shards for row in read_shard(shard)):
        with suppress(InputError):
            if isinstance(row, Row) and re.fullmatch(
                rf"{re.escape(read_record(row).id)}([#@/]\w+)*", name
            ):
                places.append(row.where)
    return places[0], places[-1]
