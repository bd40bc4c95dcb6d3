"""The plan of an extraction: base, samples, units and manifest. Nothing is written."""

from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

from carryon.cache.base.lm_head import Head
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.corpus.dataset import Corpus, Sample, read_corpus
from carryon.cache.corpus.files import Data
from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import UnitPlan, plan_samples
from carryon.cache.format.head_arrays import head_facts
from carryon.cache.format.manifest import CorpusPart, Manifest, manifest_path, read_manifest
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.zarr_metadata import chunk_rows
from carryon.cache.lock import LOCK_PATH, refuse_busy
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings, parse_tap
from carryon.cache.versions import library_versions


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """Everything that is known before the base runs."""

    root: Path
    """Folder of the store."""
    base: Base
    head: Head
    """Of the base."""
    batch_tokens: int
    """Tokens in one forward pass."""
    samples: list[Sample]
    units: UnitPlan
    manifest: Manifest
    """Of a new store with these samples."""


def plan_extraction(
    *,
    base: str | Base,
    data: Data,
    out: str | Path,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    held_out: Container[str] = (),
) -> ExtractionPlan:
    """Check the folder of the store, load base and data, and pack the samples into units.

    The arguments are those of `extract`.

    Raises:
        InputError: the folder holds something else, the base has no such tap, `max_tokens` is
            more than the base or a unit can hold, or the data cannot be read.
        StoreBusyError: another process writes to the store.
    """
    _refuse_foreign_folder(Path(out))
    refuse_busy(Path(out))
    loaded = base if isinstance(base, Base) else load_base(str(base), forward=forward)
    for tap in store.taps:
        parse_tap(tap, num_layers=loaded.identity.num_layers)
    context_tokens = loaded.identity.context_tokens
    limit = min(context_tokens, store.unit_tokens)
    if corpus.max_tokens > limit:
        raise InputError(
            f"max_tokens: expected at most {limit} (the base's context is {context_tokens}, a unit "
            f"{store.unit_tokens} tokens), got {corpus.max_tokens}"
        )
    corpus = replace(corpus, max_tokens=corpus.max_tokens or limit)
    texts = read_corpus(
        data,
        loaded.tokenizer,
        settings=corpus,
        max_tokens=corpus.max_tokens,
        held_out=held_out,
    )
    units = plan_samples(texts.samples, unit_tokens=store.unit_tokens, seed=store.seed)
    head = read_head(loaded)
    return ExtractionPlan(
        root=Path(out),
        base=loaded,
        head=head,
        batch_tokens=forward.batch_tokens,
        samples=texts.samples,
        units=units,
        manifest=describe(loaded, head, texts, units, corpus=corpus, store=store),
    )


def describe(
    base: Base,
    head: Head,
    texts: Corpus,
    units: UnitPlan,
    *,
    corpus: CorpusSettings,
    store: StoreSettings,
) -> Manifest:
    """Return the manifest of a new store with these samples."""
    row_bytes = base.identity.width * STATE_TYPES[store.dtype].itemsize
    part = CorpusPart(
        fingerprint=texts.fingerprint,
        files=texts.files,
        counts=texts.counts,
        first_unit=0,
        num_units=units.num_units,
        first_sample=0,
        num_samples=len(units.order),
    )
    return Manifest(
        base=base.identity.to_dict(),
        forward=forward_facts(base),
        corpus=corpus.to_dict(),
        settings=store.to_dict(),
        parts=[part],
        width=base.identity.width,
        rows_per_chunk=chunk_rows(row_bytes=row_bytes, unit_tokens=store.unit_tokens),
        head=head_facts(head),
        versions=library_versions(),
    )


def forward_facts(base: Base) -> dict[str, str]:
    """Return the settings of the base's forward pass that a manifest records."""
    dtype = str(base.compute_dtype).removeprefix("torch.")
    return {"compute_dtype": dtype, "attention": base.attention}


def _refuse_foreign_folder(root: Path) -> None:
    """Refuse a file, and a folder that is neither empty nor a store, finished or not."""
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder for the store, got a file")
    if manifest_path(root).exists():
        read_manifest(root)
        return
    others = sorted(path.name for path in root.iterdir())
    lock = root / LOCK_PATH
    was_killed_before_lock = others == [lock.parent.name] and not any(lock.parent.iterdir())
    if others and not lock.exists() and not was_killed_before_lock:
        raise InputError(
            f"{root}: expected a new or empty folder, or a store, but it holds {others[0]}"
            f"{' and more' if len(others) > 1 else ''}: choose another folder"
        )
