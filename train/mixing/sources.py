"""The bases that are mixed with the anchor, each from a store that is aligned to the anchor's."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import (
    CarryOnError,
    InputError,
    SettingMismatchError,
    UnfinishedStoreError,
)
from carryon.cache.format.alignment import ALIGNMENT_RULES, read_num_nodes
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike
from carryon.train.data.joined_store import JoinedStore
from carryon.train.mixing.aligned_states import STABLE
from carryon.train.mixing.vocabulary_cache import Words, cached_words
from carryon.train.mixing.vocabulary_map import VocabularyMap
from carryon.train.modules.card_checks import QUANTIZATION

if TYPE_CHECKING:
    from carryon.cache.base.facts import BaseFacts

logger = logging.getLogger(__name__)

_DIGESTS = ("weights_sha256", "tokenizer_sha256")
_SAME = (*_DIGESTS, "vocabulary_map_sha256")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """A base that is mixed with the anchor."""

    name: str
    """In reports: of its base, or the folder of its store."""
    store: Store
    """Aligned to the anchor's."""
    vocabulary_map: VocabularyMap
    taps: Sequence[str] = ()
    """Of its store that the carry-on reads; empty: only distributions are mixed."""

    @property
    def missing_samples(self) -> int:
        """Samples of the anchor that its store lacks, of which it has read nothing."""
        return int(self.store.manifest.alignment["missing_samples"])

    def facts(self) -> dict[str, Any]:
        """Return what a card records of it."""
        base = self.store.base
        read = {"taps": list(self.taps), "width": self.store.width} if self.taps else {}
        return {
            **read,
            "name": self.name,
            "base": str(base.get("id")),
            "revision": str(base.get("revision") or ""),
            **{name: str(base.get(name)) for name in _DIGESTS},
            **({QUANTIZATION: str(base[QUANTIZATION])} if base.get(QUANTIZATION) else {}),
            "vocabulary_map_sha256": self.vocabulary_map.digest(),
            "store_fingerprint": self.store.fingerprint,
        }


def open_sources(
    anchor: StoreLike, paths: Sequence[str], *, taps: Sequence[str] = ()
) -> list[Source]:
    """Open the stores that are aligned to an anchor, and read the vocabularies of the bases.

    Args:
        anchor: the store that is trained on.
        paths: folders of the others.
        taps: of each that a carry-on reads.

    Raises:
        InputError: a store is not aligned to this anchor, or of a base that is given twice, or
            the bytes of a vocabulary are not known.
        SettingMismatchError: another tokenizer is found at the place of a base.
    """
    if not isinstance(anchor, Store):
        raise InputError(
            f"mix: expected one --store, to which the others are aligned, got {anchor.name}. Fix: "
            "extract one store of all texts"
        )
    stores = [_open_aligned(anchor, path) for path in paths]
    seen: dict[tuple[str, ...], Store] = {}
    for store in stores:
        key = tuple(str(store.base.get(name)) for name in _DIGESTS)
        if (other := seen.get(key)) is not None:
            is_same = other.fingerprint == store.fingerprint
            raise InputError(
                f"mix: expected each base once, got {other.name} and {store.name}, which are "
                f"{'one store' if is_same else 'stores of one base'}"
            )
        seen[key] = store
    _refuse_other_texts(stores)
    words = [Vocabulary.read(store) for store in (anchor, *stores)]
    names = _names(anchor, stores)
    return [
        Source(
            name=name,
            store=store,
            vocabulary_map=VocabularyMap(
                source=own.tokens,
                anchor=words[0].tokens,
                source_stops=own.stops,
                anchor_stops=words[0].stops,
            ),
            taps=taps,
        )
        for name, store, own in zip(names, stores, words[1:], strict=True)
    ]


def join_states(anchor: StoreLike, sources: Sequence[Source]) -> StoreLike:
    """Return the anchor's store with the taps of the sources that a carry-on reads beside its own.

    Raises:
        InputError: a store lacks a tap.
    """
    joined = [(source.store, source.taps) for source in sources if source.taps]
    return JoinedStore(anchor, joined) if joined else anchor


def warn_about_sources(anchor: StoreLike, sources: Sequence[Source]) -> None:
    """Warn about samples that the store of a source lacks, and of text that it may know early."""
    for source in sources:
        if source.store.manifest.alignment.get("rules", 1) < ALIGNMENT_RULES:
            logger.warning(
                f"{source.name}: its store was aligned by an earlier version: where its data are "
                "conversations, or the anchor's tokenizer puts a blank before any text, it may "
                f"know what follows. Fix: carryon extract --align-to {anchor.root} again"
            )
        if source.missing_samples:
            logger.warning(
                f"{source.name}: {source.missing_samples:,} of {anchor.num_samples:,} samples are "
                "not in its store: there the base's own distribution stands for it, and its states "
                "are zeros. Fix: extract it again without --drop-missing"
            )


def order_sources(sources: Sequence[Source], card: Mapping[str, Any]) -> list[Source]:
    """Return sources in the order in which a gate was trained on them.

    Args:
        sources: to mix with.
        card: `mixture` of a carry-on's card.

    Raises:
        SettingMismatchError: they are others.
    """
    given: dict[Any, Source] = {
        tuple(source.facts()[name] for name in _SAME): source for source in sources
    }
    wanted = [tuple(each[name] for name in _SAME) for each in card["sources"]]
    if set(given) != set(wanted) or len(sources) != len(wanted):
        raise SettingMismatchError(
            f"mix: expected stores of {', '.join(each['base'] for each in card['sources'])}, which "
            "the gate was trained on, with the same weights, tokenizer and vocabulary map, got "
            f"{', '.join(source.name for source in sources)}. Fix: give an aligned store of each"
        )
    taps = [each.get("taps", ()) for each in card["sources"]]
    return [replace(given[key], taps=each) for key, each in zip(wanted, taps, strict=True)]


def _open_aligned(anchor: Store, path: str) -> Store:
    store = Store.open(path, allow_aligned=True, decoded=anchor.decoded)
    facts = store.manifest.alignment
    fix = f"Fix: carryon extract --align-to {anchor.root}"
    if not facts:
        what = "the anchor again" if store.fingerprint == anchor.fingerprint else "a store alone"
        raise InputError(
            f"mix: {path}: expected a store that is aligned to {anchor.name}, got {what}. {fix}"
        )
    if facts["anchor"] != anchor.fingerprint:
        raise InputError(
            f"mix: {path}: expected a store that is aligned to {anchor.name} "
            f"({anchor.fingerprint[:12]}), got one that is aligned to the store "
            f"{facts['anchor'][:12]} of {facts['anchor_base']}. {fix}"
        )
    if (store.samples_digest, store.unit_tokens) != (anchor.samples_digest, anchor.unit_tokens):
        raise InputError(
            f"mix: {path}: expected the samples and rows of {anchor.name}, got others. {fix}"
        )
    if len(store.finished_units) < store.num_units:
        raise UnfinishedStoreError(
            f"mix: {path}: expected {store.num_units} units, got {len(store.finished_units)}. "
            "Fix: run its extraction again, which finishes it"
        )
    if STABLE not in store.taps:
        raise InputError(
            f"mix: {path}: expected the tap final, got {', '.join(store.taps)}. {fix} --taps final"
        )
    return store


def _refuse_other_texts(stores: Sequence[Store]) -> None:
    """Check that stores with the same samples were made of the same bytes; older ones do not say.

    Each was compared with the anchor's tokens when it was made.
    """
    said: dict[bytes, tuple[str, str]] = {}
    for store in stores:
        facts, lacking = store.manifest.alignment, b""
        if "text_sha256" not in facts:
            continue
        if facts["missing_samples"]:
            lacking = (read_num_nodes(store.root, store.manifest) == 0).tobytes()
        digest = facts["text_sha256"]
        name, expected = said.setdefault(lacking, (store.name, digest))
        if digest != expected:
            raise InputError(
                f"mix: {store.name}: expected the texts that {name} was made of "
                f"({expected[:12]}), got others ({digest[:12]}). Fix: carryon extract "
                "--align-to with the same --data for both"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Bytes of a base's tokens, and those that end a turn."""

    tokens: Sequence[bytes | None]
    stops: Sequence[int]

    @classmethod
    def read(cls, store: Store) -> "Vocabulary":
        """Read the vocabulary of a store's base: from the cache, or at the place that it names.

        Raises:
            InputError: it is not found there, or the bytes of its tokens are not known.
            SettingMismatchError: another one is found there.
        """
        size = int(store.manifest.head["vocab_size"])
        tokens, stops = cached_words(
            store.base, vocab_size=size, compute=lambda: _read_words(store, size)
        )
        return cls(tokens=tokens, stops=stops)

    @classmethod
    def of(cls, facts: "BaseFacts", size: int) -> "Vocabulary":
        """Return the vocabulary of a base.

        Args:
            facts: of the base.
            size: rows of its head.

        Raises:
            InputError: the bytes of its tokens are not known.
        """
        from carryon.cache.corpus.vocabulary.token_bytes import token_bytes

        return cls(
            tokens=token_bytes(facts.tokenizer, vocab_size=size),
            stops=[token for token in facts.end_tokens if token < size],
        )


def _read_words(store: Store, size: int) -> Words:
    """Return the bytes of the tokens of a store's base and its stop tokens, from its tokenizer."""
    # Not needed by runs of one base, and slow to import.
    from carryon.cache.base.facts import read_facts
    from carryon.cache.base.identity import digest_tokenizer
    from carryon.cache.base.recorded import recorded_source

    try:
        facts = read_facts(recorded_source(store.base, where=store.name))
        found = Vocabulary.of(facts, size)
    except CarryOnError as error:
        raise InputError(
            f"mix: {store.name}: expected the tokenizer of its base, whose tokens are mixed by "
            f"their bytes: {str(error).rstrip('.')}"
        ) from error
    _refuse_other_tokenizer(store.base, digest_tokenizer(facts.tokenizer), where=store.name)
    return found.tokens, found.stops


def _refuse_other_tokenizer(base: Mapping[str, Any], digest: str, *, where: str) -> None:
    expected = base.get("tokenizer_sha256")
    if digest != expected:
        raise SettingMismatchError(
            f"mix: {where}: expected the tokenizer {str(expected)[:12]} at {base.get('id')}, got "
            f"{digest[:12]}. Fix: put the base back that the store was made with"
        )


def _names(anchor: Store, stores: Sequence[Store]) -> list[str]:
    """Return a name for each store: of its base, or of its folder where that tells more."""
    bases = [Path(str(store.base.get("id"))).name for store in (anchor, *stores)]
    if len(set(bases)) == len(bases):
        return bases[1:]
    folders = [store.root.name for store in stores]
    return folders if len(set(folders)) == len(folders) else [store.name for store in stores]
