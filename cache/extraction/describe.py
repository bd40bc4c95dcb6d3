"""What a store is going to be: base, corpus and settings as a plan and a manifest. Pure."""

import numpy as np

from carryon.cache.base.model import Base, read_head
from carryon.cache.corpus.dataset import Corpus
from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import UnitPlan, plan_units
from carryon.cache.format.head_arrays import head_facts
from carryon.cache.format.manifest import CorpusPart, Manifest
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.zarr_metadata import ITEM_BYTES, chunk_rows
from carryon.cache.settings import CorpusSettings, StoreSettings
from carryon.cache.versions import library_versions


def longest_sample(corpus: CorpusSettings, store: StoreSettings, base: Base) -> int:
    """Return the longest sample allowed, in tokens; resolves `max_tokens` 0.

    Raises:
        InputError: `max_tokens` is more than the base or a unit can hold.
    """
    limit = min(base.identity.context_tokens, store.unit_tokens)
    if corpus.max_tokens > limit:
        raise InputError(
            f"max_tokens: expected at most {limit} (the base's context is "
            f"{base.identity.context_tokens}, a unit {store.unit_tokens} tokens), "
            f"got {corpus.max_tokens}"
        )
    return corpus.max_tokens or limit


def plan_corpus(texts: Corpus, store: StoreSettings) -> UnitPlan:
    """Lay the samples of a corpus out in units."""
    lengths = np.array([len(sample.tokens) for sample in texts.samples], dtype=np.int32)
    held_out = np.array([sample.is_held_out for sample in texts.samples], dtype=np.bool_)
    return plan_units(lengths, held_out, unit_tokens=store.unit_tokens, seed=store.seed)


def forward_facts(base: Base) -> dict[str, str]:
    """Return what the manifest says of how the base computes."""
    return {
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "attention": base.attention,
    }


def describe(
    base: Base, texts: Corpus, plan: UnitPlan, *, corpus: CorpusSettings, store: StoreSettings
) -> Manifest:
    """Return the manifest of a new store with these samples."""
    width = base.identity.width
    item_bytes = ITEM_BYTES[STATE_TYPES[store.dtype]]
    part = CorpusPart(
        fingerprint=texts.fingerprint,
        files=texts.files,
        counts=texts.counts,
        first_unit=0,
        num_units=plan.num_units,
        first_sample=0,
        num_samples=len(plan.order),
    )
    return Manifest(
        base=base.identity.to_dict(),
        forward=forward_facts(base),
        corpus=corpus.to_dict(),
        settings=store.to_dict(),
        parts=[part],
        width=width,
        rows_per_chunk=chunk_rows(row_bytes=width * item_bytes, unit_tokens=store.unit_tokens),
        head=head_facts(read_head(base)),
        versions=library_versions(),
    )
