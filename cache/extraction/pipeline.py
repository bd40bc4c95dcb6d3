"""Extraction: one pass of the frozen base over a corpus, unit by unit, into a store.

The plan is written first, then units one by one; each is committed by its receipt. The same call
resumes: finished units are skipped, the others computed.
"""

import logging
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.corpus.dataset import Corpus, read_corpus
from carryon.cache.errors import InputError
from carryon.cache.extraction.describe import describe, longest_sample, plan_corpus
from carryon.cache.extraction.estimate import Estimate, estimate
from carryon.cache.extraction.forward import ExtractReport, raw_bytes, run_units
from carryon.cache.extraction.layout_writer import append_plan, plan_bytes, write_plan
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.extraction.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.extraction.resume import refuse_other_data, refuse_other_settings
from carryon.cache.files import sweep_partials
from carryon.cache.format.manifest import Manifest, manifest_path, read_manifest
from carryon.cache.lock import LOCK_PATH, refuse_busy, write_lock
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings, parse_tap
from carryon.cache.store.top_blocks import block_files

logger = logging.getLogger(__name__)

_EXPECTED_RATIO = {"exact": 0.68, "near": 0.42, "compact": 0.36}
"""Stored bytes against raw, before anything is measured; --dry-run measures."""


def extract(
    *,
    base: str | Base,
    data: Sequence[str | Path],
    out: str | Path,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    append: bool = False,
    max_disk_bytes: int | None = None,
    held_out: Container[str] = (),
) -> ExtractReport:
    """Extract the hidden states of a corpus into the store at `out`, or go on with it.

    Args:
        base: hub id, folder or .gguf file; or a base that is loaded already.
        data: files (or folders) of the corpus.
        out: folder of the store; made if missing.
        corpus: how text becomes samples.
        store: what the store holds.
        forward: how the base is run.
        append: add the samples of `data` to a store that is there.
        max_disk_bytes: stop before the store would grow beyond it; what is written stays valid
            and the same call with more room goes on.
        held_out: ids of samples to hold out, besides those that the data marks.

    Raises:
        InputError: data, tap or setting cannot be used; nothing was written.
        SettingMismatchError: the store was begun with other settings; nothing was changed.
        StoreBusyError: another process writes to the store.
        DiskFullError: what was finished is kept; the same call goes on.
    """
    root = Path(out)
    refuse_foreign_folder(root)
    refuse_busy(root)
    loaded, texts, plan, manifest = _prepare(base, data, corpus, store, forward, held_out)
    logger.info(_prediction(manifest))
    with write_lock(root):
        sweep_partials(root)
        if not manifest_path(root).exists():
            if append:
                raise InputError(f"{root}: no store to append to: leave out --append")
            manifest = _begin(root, loaded, manifest, texts, plan, max_disk_bytes)
        else:
            manifest = _go_on(root, manifest, texts, plan, append=append)
        return run_units(
            root, manifest, loaded, batch_tokens=forward.batch_tokens, max_disk_bytes=max_disk_bytes
        )


def dry_run(
    *,
    base: str | Base,
    data: Sequence[str | Path],
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
) -> Estimate:
    """Run a few samples and predict bytes and time of the whole extraction; writes nothing."""
    loaded, texts, plan, manifest = _prepare(base, data, corpus, store, forward)
    return estimate(loaded, texts, plan, manifest, batch_tokens=forward.batch_tokens)


def refuse_foreign_folder(root: Path) -> None:
    """Check that `root` is new, empty, or a store (begun or whole).

    Raises:
        InputError: it is a file, or a folder that holds something else.
        StoreError: it holds a Zarr group of someone else.
    """
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


def _prepare(
    base: str | Base,
    data: Sequence[str | Path],
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    held_out: Container[str] = (),
) -> tuple[Base, Corpus, UnitPlan, Manifest]:
    """Load base and corpus and plan the store; nothing is written."""
    loaded = load_base(base, forward=forward) if isinstance(base, str) else base
    for tap in store.taps:
        parse_tap(tap, num_layers=loaded.identity.num_layers)
    corpus = replace(corpus, max_tokens=longest_sample(corpus, store, loaded))
    texts = read_corpus(
        data,
        loaded.tokenizer,
        settings=corpus,
        max_tokens=corpus.max_tokens,
        held_out=held_out,
    )
    plan = plan_corpus(texts, store)
    return loaded, texts, plan, describe(loaded, texts, plan, corpus=corpus, store=store)


def _begin(
    root: Path,
    base: Base,
    manifest: Manifest,
    texts: Corpus,
    plan: UnitPlan,
    max_disk_bytes: int | None,
) -> Manifest:
    head = read_head(base)
    blocks = block_files(base, manifest.num_blocks)
    pilot = run_pilot(base, manifest.taps, texts.samples, plan)
    errors = measure_profile(pilot, head, taps=manifest.taps, profile=manifest.settings["profile"])
    manifest, probe = replace(manifest, profile_error=errors), make_probe(pilot)
    if max_disk_bytes is not None:
        needed = plan_bytes(manifest, texts.samples, plan, head=head, probe=probe, blocks=blocks)
        if needed > max_disk_bytes:
            raise InputError(
                f"max_disk: expected more than {needed / 1e6:,.1f} MB, which the head and the "
                f"plan of {root} take before its first unit, got {max_disk_bytes / 1e6:,.1f} MB"
            )
    return write_plan(root, manifest, texts.samples, plan, head=head, probe=probe, blocks=blocks)


def _go_on(
    root: Path, manifest: Manifest, texts: Corpus, plan: UnitPlan, *, append: bool
) -> Manifest:
    old = read_manifest(root)
    refuse_other_settings(old, manifest, name=str(root))
    if not append or texts.fingerprint in [part.fingerprint for part in old.parts]:
        refuse_other_data(old, manifest, name=str(root))
        return old
    part = replace(manifest.parts[0], first_unit=old.num_units, first_sample=old.num_samples)
    return append_plan(root, old, replace(old, parts=[*old.parts, part]), texts.samples, plan)


def _prediction(manifest: Manifest) -> str:
    raw = raw_bytes(manifest, manifest.num_tokens)
    predicted = raw * _EXPECTED_RATIO[manifest.settings["profile"]]
    return (
        f"{manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens "
        f"({manifest.num_supervised:,} supervised) in {manifest.num_units:,} units; taps "
        f"{' '.join(manifest.taps)}: about {predicted / 1e6:,.1f} MB of {raw / 1e6:,.1f} MB raw"
    )
