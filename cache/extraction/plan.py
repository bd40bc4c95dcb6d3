"""The plan of an extraction: base, samples, units and manifest. Nothing is written.

Everything that can be wrong with the data is found before the base is loaded.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.facts import BaseFacts, facts_of, read_facts
from carryon.cache.base.identity import digest_chat_template
from carryon.cache.base.lm_head import Head
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.base.quantizers import quantizer_version
from carryon.cache.base.recorded import tokenizer_of
from carryon.cache.corpus.chat.template_settings import resolve_settings
from carryon.cache.corpus.dataset import Corpus, read_corpus
from carryon.cache.corpus.report import format_report, warnings
from carryon.cache.corpus.rows import Data
from carryon.cache.corpus.samples import SampleTable
from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import UnitPlan, plan_samples
from carryon.cache.format.head_arrays import head_facts
from carryon.cache.format.manifest import (
    ENGINE,
    CorpusPart,
    Manifest,
    manifest_path,
    read_manifest,
)
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.zarr_metadata import chunk_rows
from carryon.cache.lock import LOCK_PATH, refuse_busy
from carryon.cache.settings import (
    CorpusSettings,
    DataSettings,
    ForwardSettings,
    StoreSettings,
    parse_tap,
)
from carryon.cache.versions import library_versions

logger = logging.getLogger(__name__)

Reload = Callable[[str], Base]
"""From the name of a compute dtype to the base in it."""


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
    samples: SampleTable
    units: UnitPlan
    skipped: list[dict[str, Any]]
    """Place and problem of each row that was left out."""
    manifest: Manifest
    """Of a new store with these samples."""
    reload: Reload | None
    """Loads the base in another compute dtype. None: its dtype was given."""


def plan_extraction(
    *,
    base: str | Base,
    data: Data,
    out: str | Path,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    data_settings: DataSettings,
    held_out: Collection[str] = (),
    choose: Callable[[Callable[[], Corpus], BaseFacts], Corpus] | None = None,
    is_shared: bool = False,
) -> ExtractionPlan:
    """Check the folder of the store, read the data, load the base, and pack samples into units.

    The arguments are those of `extract`. `choose` returns the samples to plan, given the function
    that reads the data, and facts of the base. None: those of the data. `is_shared` is whether
    other processes may be at work.

    Raises:
        InputError: the folder, a tap, `max_tokens` or the data cannot be used.
        StoreBusyError: another process writes to the store.
    """
    root = Path(out)
    refuse_foreign_folder(root)
    refuse_busy(root, is_shared=is_shared)
    pick_device(forward.device)  # refuses one that is not there
    forward = keep_compute_dtype(forward, root)
    like = _stored_tokenizer(root)
    facts = look_up_facts(base, forward, like=like)
    _check_sizes(facts, store)
    corpus = _with_max_tokens(corpus, facts, store)
    corpus, tokenizer = resolve_settings(corpus, facts.tokenizer, stored_date=_stored_date(root))
    read = partial(
        read_corpus,
        data,
        tokenizer,
        settings=corpus,
        max_tokens=corpus.max_tokens,
        data_settings=data_settings,
        held_out=held_out,
        end_tokens=facts.end_tokens,
        vocab_size=facts.vocab_size,
    )
    texts = read() if choose is None else choose(read, facts)
    log_report(texts)
    units = plan_samples(texts.samples, unit_tokens=store.unit_tokens, seed=store.seed)
    loaded, reload = load_to_extract(base, forward, like=like)
    loaded = _with_tokenizer(loaded, tokenizer)
    _check_sizes(facts_of(loaded), store)
    head = read_head(loaded)
    return ExtractionPlan(
        root=root,
        base=loaded,
        head=head,
        batch_tokens=forward.batch_tokens,
        samples=texts.samples,
        units=units,
        skipped=texts.skipped,
        manifest=describe(loaded, head, texts, units, corpus=corpus, store=store),
        reload=reload,
    )


def look_up_facts(
    base: str | Base, forward: ForwardSettings, *, like: str | None = None
) -> BaseFacts:
    """Return what is known of a base before it is loaded, or of one that is.

    Arguments are those of `load_to_extract`, errors those of `read_facts`.
    """
    if isinstance(base, Base):
        return facts_of(base)
    return read_facts(str(base), like=like, trusts_code=forward.trust_remote_code)


def _with_max_tokens(
    corpus: CorpusSettings, facts: BaseFacts, store: StoreSettings
) -> CorpusSettings:
    """Return the settings with the length that `max_tokens` stands for, if it is 0.

    Raises:
        InputError: it is more than the base or a unit can hold.
    """
    limit = min(facts.context_tokens, store.unit_tokens)
    if corpus.max_tokens > limit:
        raise InputError(
            f"max_tokens: expected at most {limit} (the base's context is {facts.context_tokens}, "
            f"a unit {store.unit_tokens} tokens), got {corpus.max_tokens}"
        )
    return replace(corpus, max_tokens=corpus.max_tokens or limit)


def load_to_extract(
    base: str | Base, forward: ForwardSettings, *, like: str | None = None
) -> tuple[Base, Reload | None]:
    """Return a loaded base, and how to load it in another dtype if `forward` leaves that open.

    Args:
        base: hub id, folder or .gguf file; or a loaded base.
        forward: how the base is run.
        like: digest of a recorded tokenizer, as of `read_tokenizer`.
    """
    if isinstance(base, Base):
        return base, None

    def load(dtype: str) -> Base:
        how = replace(forward, compute_dtype=dtype)  # type: ignore[arg-type]  # checked
        return load_base(str(base), forward=how, like=like)

    is_open = forward.compute_dtype == "auto"
    return load(forward.compute_dtype), load if is_open else None


def keep_compute_dtype(forward: ForwardSettings, root: Path) -> ForwardSettings:
    """Return settings in which `auto` is the compute dtype of the store at `root`, if there is one.

    So a store has one dtype on machines of which others are faster in another.
    """
    recorded = _stored_dtype(root)
    if forward.compute_dtype != "auto" or recorded is None:
        return forward
    return replace(forward, compute_dtype=recorded)  # type: ignore[arg-type]  # checked


def reloaded_as_stored(
    root: Path, base: Base, manifest: Manifest, reload: Reload | None
) -> dict[str, Any]:
    """Return what changes of a plan if another process has planned the store in another dtype.

    Args:
        root: of the store.
        base: as it was loaded before the store was planned.
        manifest: of the plan with it.
        reload: as of ExtractionPlan.

    Returns:
        `base`, `head` and `manifest` in the compute dtype of the store; nothing if it is that.
    """
    recorded = _stored_dtype(root)
    if reload is None or recorded in (None, forward_facts(base)["compute_dtype"]):
        return {}
    loaded = _with_tokenizer(reload(str(recorded)), base.tokenizer)
    head = read_head(loaded)
    new = replace(manifest, forward=forward_facts(loaded), head=head_facts(head))
    return {"base": loaded, "head": head, "manifest": new}


def log_report(texts: Corpus) -> None:
    """Log what was read, kept and lost, and a warning for each loss that matters."""
    logger.info(format_report(texts.report))
    for line in warnings(texts.report):
        logger.warning(line)


def _check_sizes(facts: BaseFacts, store: StoreSettings) -> None:
    """Check taps and the size of a unit, as far as the base's sizes are known."""
    if facts.num_layers is not None:
        for tap in store.taps:
            parse_tap(tap, num_layers=facts.num_layers)
    if facts.width is not None:
        chunk_rows(row_bytes=_row_bytes(facts.width, store), unit_tokens=store.unit_tokens)


def _row_bytes(width: int, store: StoreSettings) -> int:
    return width * STATE_TYPES[store.dtype].itemsize


def _stored_date(root: Path) -> str:
    """Return the date that the chat template of an existing store printed; empty for none."""
    if not manifest_path(root).exists():
        return ""
    return str(read_manifest(root).corpus.get("template_date", ""))


def _stored_dtype(root: Path) -> str | None:
    """Return the dtype that an existing store was computed in; None for none, or another engine."""
    if not manifest_path(root).exists():
        return None
    forward = read_manifest(root).forward
    return None if ENGINE in forward else forward.get("compute_dtype")


def _stored_tokenizer(root: Path) -> str | None:
    """Return the digest of the tokenizer that an existing store was made with; None for none."""
    if not manifest_path(root).exists():
        return None
    return tokenizer_of(read_manifest(root).base)


def _with_tokenizer(base: Base, tokenizer: Tokenizer) -> Base:
    """Return the base with the tokenizer that the texts were read with: its chat template differs
    where `chat_template` gives another."""
    digest = digest_chat_template(tokenizer)
    identity = replace(base.identity, chat_template_sha256=digest)
    return replace(base, tokenizer=tokenizer, identity=identity)


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
    row_bytes = _row_bytes(base.identity.width, store)
    part = CorpusPart(
        fingerprint=texts.fingerprint,
        files=texts.files,
        counts=texts.counts,
        first_unit=0,
        num_units=units.num_units,
        first_sample=0,
        num_samples=len(units.order),
        report=texts.report.to_dict(),
        kinds=texts.kinds,
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
        versions=library_versions() | quantizer_version(base.identity.quantization),
    )


def forward_facts(base: Base) -> dict[str, str]:
    """Return the settings of the base's forward pass that a manifest records."""
    dtype = str(base.compute_dtype).removeprefix("torch.")
    return {"compute_dtype": dtype, "attention": base.attention}


def refuse_foreign_folder(root: Path) -> None:
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
