"""The plan of a store that has another store's samples and rows, its anchor's.

The records are read again, with the anchor's tokenizer and with the base's; what the anchor holds
must come out. Nothing is written. Letters: S samples, R rows and n nodes of a unit.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts
from carryon.cache.alignment.tree import TokenTree, depths
from carryon.cache.base.facts import BaseFacts, facts_of, read_facts
from carryon.cache.base.identity import digest_tokenizer, refuse_other_digests
from carryon.cache.base.model import Base
from carryon.cache.base.recorded import recorded_source
from carryon.cache.corpus.chat.chat_template import UnfitError
from carryon.cache.corpus.chat.template_settings import resolve_settings
from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.records import Record, read_record
from carryon.cache.corpus.rows import BadRow, Data, Source
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.format.alignment import ALIGNMENT_RULES, UnitAlignment
from carryon.cache.settings import CorpusSettings, DataSettings, StoreSettings
from carryon.cache.store.reader import Store

logger = logging.getLogger(__name__)

_ROWS = ("tokens", "loss_mask", "char_end")
_TEMPLATE = ("chat_template", "chat_template_kwargs", "template_date")
"""Settings of a corpus that each base has its own of."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Alignment:
    """A base's tokens for all samples of an anchor."""

    units: list[UnitAlignment]
    num_nodes: NDArray[np.int32]
    """[S] nodes of each sample; 0 where the data lack it."""
    facts: dict[str, Any]
    """What the manifest records."""

    @property
    def unit_nodes(self) -> int:
        """Return the most nodes of a unit."""
        return int(self.facts["unit_nodes"])


def open_anchor(path: str | Path) -> Store:
    """Open the store to align to.

    Raises:
        InputError: it is itself aligned to another store, or a later part of one.
    """
    anchor = Store.open(path, allow_aligned=True)
    if facts := anchor.manifest.alignment:
        raise InputError(
            f"--align-to {path}: expected a store of its own, got one that is aligned to the store "
            f"{facts['anchor'][:12]} of {facts['anchor_base']}. Fix: give that store, the anchor"
        )
    if anchor.name not in (str(anchor.root), f"{anchor.root}#1"):
        raise InputError(
            f"--align-to {path}: expected a whole store or its first part, got a later part. Fix: "
            f"--align-to {anchor.root}, with the --data of all its parts"
        )
    return anchor


def keep_settings(anchor: Store, corpus: CorpusSettings, store: StoreSettings) -> StoreSettings:
    """Return the settings of an aligned store: units and seed are the anchor's.

    Raises:
        InputError: another value than the anchor's is given for what is the anchor's; the default
            cannot be told from nothing.
    """
    recorded = {"seed": 0, **anchor.manifest.settings}
    kept = {name: recorded[name] for name in ("unit_tokens", "seed")}
    cuts = {name: value for name, value in corpus.to_dict().items() if name not in _TEMPLATE}
    cuts |= {name: getattr(store, name) for name in kept}
    defaults = {**StoreSettings().to_dict(), **CorpusSettings().to_dict()}
    old = {**defaults, **anchor.manifest.corpus, **kept}
    for name, value in cuts.items():
        if value not in (defaults.get(name, 0), old[name]):
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option}: expected {old[name]!s:.40}, which {anchor.name} was made with, got "
                f"{value}. Fix: leave out {option}, as samples and rows are the anchor's"
            )
    return replace(store, **kept)


def align_to_anchor(
    anchor: Store,
    base: Base,
    data: Data,
    *,
    corpus: CorpusSettings,
    data_settings: DataSettings,
    drop_missing: bool,
) -> Alignment:
    """Read the records of an anchor again, and align the base's tokens with its rows.

    Args:
        anchor: the store.
        base: whose tokens they are.
        data: the anchor's data.
        corpus: chat template, its variables and date for the base; all else is the anchor's.
        data_settings: how the data are read.
        drop_missing: leave out, and count, samples that only one of anchor and data has.

    Raises:
        InputError: data and anchor hold other samples or other text, or a tokenizer cannot be
            aligned.
        SettingMismatchError: the anchor's tokenizer is not the one that it was made with.
        MissingError: the anchor's base is not found.
    """
    own, other = _readings(anchor, base, corpus)
    numbers = {anchor.sample_id(index): index for index in range(anchor.num_samples)}
    if len(numbers) < anchor.num_samples:
        raise InputError(f"{anchor.name}: expected a different id for each sample")
    found: dict[int, AlignedSample] = {}
    sources = open_sources(data, data_settings, folder=cache_folder())
    known = {file.get("sha256") for part in anchor.manifest.parts for file in part.files}
    is_same_data = all(source.sha256 in known for source in sources)
    aligner = Aligner(own, other, is_same_data=is_same_data)
    unknown = 0
    for aligned in _aligned(aligner, sources, data_settings):
        index = numbers.get(aligned.sample.id)
        if index is not None:
            _refuse_long(aligned, base)
            found[index] = aligned
            continue
        unknown += 1
        if not drop_missing:
            raise InputError(
                f"sample {aligned.sample.id!r}: expected samples of {anchor.name}, got one that "
                "it does not hold. Fix: give the anchor's own --data, or --drop-missing"
            )
    missing = [index for index in range(anchor.num_samples) if index not in found]
    if missing and not drop_missing:
        raise InputError(
            f"sample {anchor.sample_id(missing[0])!r}: expected all {anchor.num_samples} samples "
            f"of {anchor.name} in the data, got {len(found)}. Fix: give all of the anchor's "
            "--data, or --drop-missing"
        )
    if missing or unknown:
        logger.warning(
            f"{len(missing):,} samples of {anchor.name} are not in the data, {unknown:,} of the "
            "data not in it: dropped"
        )
    return _arrange(anchor, base, found, own, missing=len(missing))


def _readings(anchor: Store, base: Base, corpus: CorpusSettings) -> tuple[BaseTexts, BaseTexts]:
    """Return how the anchor's base and the other one read records."""
    recorded = anchor.manifest.corpus
    names = CorpusSettings().to_dict().keys()
    settings = CorpusSettings.from_dict({k: v for k, v in recorded.items() if k in names})
    facts = read_facts(recorded_source(anchor.base, where=anchor.root))
    where = f"base {anchor.base['id']}"
    refuse_other_digests(
        {"tokenizer_sha256": anchor.base.get("tokenizer_sha256")},
        {"tokenizer_sha256": digest_tokenizer(facts.tokenizer)},
        where=where,
    )
    given = {name: getattr(corpus, name) for name in _TEMPLATE}
    readings = []
    for each, known, name in (
        (settings, facts, str(anchor.base["id"])),
        (replace(settings, **given), facts_of(base), base.source),
    ):
        resolved, tokenizer = resolve_settings(each, known.tokenizer)
        readings.append(
            BaseTexts(
                tokenizer,
                name=name,
                settings=resolved,
                max_tokens=settings.max_tokens,
                end_tokens=_ends(known),
                vocab_size=known.vocab_size,
            )
        )
    return readings[0], readings[1]


def _ends(facts: BaseFacts) -> list[int]:
    return list(facts.end_tokens)


def _records(sources: Sequence[Source], settings: DataSettings) -> Iterator[Record]:
    for shard in plan_shards(sources):
        for row in read_shard(shard):
            try:
                if isinstance(row, BadRow):
                    raise InputError(f"{row.where}: {row.problem}")
                record = read_record(row)
            except InputError:
                if settings.bad_rows == "skip":
                    continue
                raise
            yield record


def _aligned(
    aligner: Aligner, sources: Sequence[Source], settings: DataSettings
) -> Iterator[AlignedSample]:
    """Yield the samples of all records; an error names the record."""
    for record in _records(sources, settings):
        try:
            yield from aligner.align(record)
        except UnfitError as error:
            if not settings.drop_unfit:
                raise InputError(f"{record.where}: {error}") from error
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from error


def _refuse_long(aligned: AlignedSample, base: Base) -> None:
    most = base.identity.context_tokens
    if len(aligned.tree.tokens) > most and int(depths(aligned.tree.parents).max()) >= most:
        raise InputError(
            f"sample {aligned.sample.id!r}: expected at most {most} tokens, the context of "
            f"{base.source}, got more. Fix: extract the anchor with a smaller --max-tokens"
        )


def _arrange(
    anchor: Store, base: Base, found: Mapping[int, AlignedSample], own: BaseTexts, *, missing: int
) -> Alignment:
    """Put samples at the rows of the anchor, and compare them with what it holds."""
    num_nodes = np.zeros(anchor.num_samples, dtype=np.int32)
    units = []
    for number in range(anchor.num_units):
        unit = anchor.read_unit(number, taps=[])
        trees: list[tuple[int, TokenTree]] = []
        for index, start, length in zip(unit.samples, unit.starts, unit.lengths, strict=True):
            if index not in found:
                continue
            sample = found[index].sample
            for name in _ROWS:
                stored = getattr(unit, name)[start : start + length]
                if not np.array_equal(stored, getattr(sample, name)):
                    raise InputError(
                        f"sample {sample.id!r}: expected the text that {anchor.name} was made of, "
                        f"got one with other {name}. Fix: give the anchor's own --data"
                    )
            trees.append((int(start), found[index].tree))
            num_nodes[index] = len(found[index].tree.tokens)
        units.append(_join_trees(trees, anchor.unit_tokens))
    texts = hashlib.sha256()
    for index in sorted(found):
        texts.update(hashlib.sha256(found[index].sample.id.encode()).digest())
        texts.update(found[index].text_sha256)
    digest = hashlib.sha256(num_nodes.tobytes())
    for each in units:
        digest.update(each.digest())
    facts = {
        "anchor": anchor.fingerprint,
        "anchor_base": str(anchor.base["id"]),
        "anchor_tokenizer_sha256": anchor.base["tokenizer_sha256"],
        "anchor_vocab_size": int(anchor.manifest.head["vocab_size"]),
        "tokenizer_sha256": base.identity.tokenizer_sha256,
        "digest": digest.hexdigest(),
        "text_sha256": texts.hexdigest(),
        "missing_samples": missing,
        "rules": ALIGNMENT_RULES,
        "unit_nodes": max(1, *(len(each.tokens) for each in units)),
    }
    return Alignment(units=units, num_nodes=num_nodes, facts=facts)


def _join_trees(trees: list[tuple[int, TokenTree]], rows: int) -> UnitAlignment:
    """Return the trees of a unit, one behind the other."""
    exact, stable = (np.full(rows, -1, dtype=np.int32) for _ in range(2))
    covered, is_whole = np.zeros(rows, dtype=np.int32), np.zeros(rows, dtype=np.uint8)
    tokens, parents, at = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for start, tree in trees:
        span = slice(start, start + len(tree.exact))
        for to, nodes in ((exact, tree.exact), (stable, tree.stable)):
            to[span] = np.where(nodes >= 0, nodes + at, -1)
        covered[span], is_whole[span] = tree.covered, tree.is_whole
        tokens.append(tree.tokens)
        parents.append(np.where(tree.parents >= 0, tree.parents + at, -1).astype(np.int32))
        at += len(tree.tokens)
    return UnitAlignment(
        tokens=np.concatenate(tokens),
        parents=np.concatenate(parents),
        exact=exact,
        stable=stable,
        covered=covered,
        is_whole=is_whole,
    )


def refuse_other_alignment(old: Mapping[str, Any], new: Mapping[str, Any], *, name: str) -> None:
    """Check that a store that is resumed is aligned as before.

    Raises:
        SettingMismatchError: names what differs.
    """
    for key in sorted({*old, *new}):
        is_older = key in ("text_sha256", "rules") and key not in old  # the digest decides
        if old.get(key) != new.get(key) and not is_older:
            raise SettingMismatchError(
                f"{name}: alignment: {key}: expected {str(old.get(key, 'none'))[:12]}, which the "
                f"store was made with, got {str(new.get(key, 'none'))[:12]}. Fix: give the same "
                "--align-to and --data, or another --out"
            )
