"""Extraction: one pass of the frozen base over a corpus, unit by unit, into a store.

The plan is written first, then units one by one; each is committed by its receipt. The same call
resumes: finished units are skipped, the others computed.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from carryon.cache.atomic import sweep_partials
from carryon.cache.base import Base, load_base, read_head
from carryon.cache.corpus import Corpus, read_corpus
from carryon.cache.errors import InputError
from carryon.cache.head_files import head_facts
from carryon.cache.layout import ITEM_BYTES, chunk_rows
from carryon.cache.lock import LOCK_PATH, write_lock
from carryon.cache.manifest import CorpusPart, Manifest, manifest_path, read_manifest
from carryon.cache.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.plan import UnitPlan, plan_units
from carryon.cache.plan_writer import append_plan, write_plan
from carryon.cache.precision import STATE_TYPES
from carryon.cache.resume import refuse_other_data, refuse_other_settings
from carryon.cache.run_units import ExtractReport, run_units
from carryon.cache.spec import CorpusSettings, ForwardSettings, StoreSettings, parse_tap

_PILOT_SAMPLES = 2
_EXPECTED_RATIO = {"exact": 0.68, "near": 0.42, "compact": 0.36}
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "numcodecs", "zarr", "gpt-carry-on")


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

    Raises:
        InputError: data, tap or setting cannot be used; nothing was written.
        SettingMismatchError: the store was begun with other settings; nothing was changed.
        StoreBusyError: another process writes to the store.
        DiskFullError: what was finished is kept; the same call goes on.
    """
    root = Path(out)
    refuse_foreign_folder(root)
    loaded = load_base(base, forward=forward) if isinstance(base, str) else base
    for tap in store.taps:
        parse_tap(tap, num_layers=loaded.identity.num_layers)
    corpus = replace(corpus, max_tokens=_longest(corpus, store, loaded))
    texts = read_corpus(data, loaded.tokenizer, settings=corpus, max_tokens=corpus.max_tokens)
    plan = _plan(texts, store)
    manifest = _describe(loaded, texts, plan, corpus=corpus, store=store)
    _print_prediction(manifest)
    with write_lock(root):
        sweep_partials(root)
        if not manifest_path(root).exists():
            if append:
                raise InputError(f"{root}: no store to append to: leave out --append")
            manifest = _begin(root, loaded, manifest, texts, plan)
        else:
            manifest = _go_on(root, manifest, texts, plan, append=append)
        return run_units(
            root, manifest, loaded, batch_tokens=forward.batch_tokens, max_disk_bytes=max_disk_bytes
        )


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
    if others and not (root / LOCK_PATH).exists():
        raise InputError(
            f"{root}: expected a new or empty folder, or a store, but it holds {others[0]}"
            f"{' and more' if len(others) > 1 else ''}: choose another folder"
        )


def _longest(corpus: CorpusSettings, store: StoreSettings, base: Base) -> int:
    limit = min(base.identity.context_tokens, store.unit_tokens)
    if corpus.max_tokens > limit:
        raise InputError(
            f"max_tokens: expected at most {limit} (the base's context is "
            f"{base.identity.context_tokens}, a unit {store.unit_tokens} tokens), "
            f"got {corpus.max_tokens}"
        )
    return corpus.max_tokens or limit


def _plan(texts: Corpus, store: StoreSettings) -> UnitPlan:
    lengths = np.array([len(sample.tokens) for sample in texts.samples], dtype=np.int32)
    held_out = np.array([sample.is_held_out for sample in texts.samples], dtype=np.bool_)
    return plan_units(lengths, held_out, unit_tokens=store.unit_tokens, seed=store.seed)


def _describe(
    base: Base, texts: Corpus, plan: UnitPlan, *, corpus: CorpusSettings, store: StoreSettings
) -> Manifest:
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
        forward={
            "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
            "attention": base.attention,
        },
        corpus=corpus.to_dict(),
        settings=store.to_dict(),
        parts=[part],
        width=width,
        rows_per_chunk=chunk_rows(row_bytes=width * item_bytes, unit_tokens=store.unit_tokens),
        head=head_facts(read_head(base)),
        versions={name: version(name) for name in _VERSIONS},
    )


def _begin(root: Path, base: Base, manifest: Manifest, texts: Corpus, plan: UnitPlan) -> Manifest:
    head = read_head(base)
    first = range(min(_PILOT_SAMPLES, int((plan.unit == 0).sum())))
    pilot = run_pilot(
        base,
        manifest.taps,
        [texts.samples[int(plan.order[position])].tokens for position in first],
        [int(plan.start[position]) for position in first],
    )
    errors = measure_profile(pilot, head, taps=manifest.taps, profile=manifest.settings["profile"])
    manifest = replace(manifest, profile_error=errors)
    return write_plan(root, manifest, texts.samples, plan, head=head, probe=make_probe(pilot))


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


def _print_prediction(manifest: Manifest) -> None:
    settings = manifest.settings
    item_bytes = ITEM_BYTES[STATE_TYPES[settings["dtype"]]]
    raw = manifest.num_tokens * manifest.width * item_bytes * len(manifest.taps)
    predicted = raw * _EXPECTED_RATIO[settings["profile"]]
    print(
        f"{manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens "
        f"({manifest.num_supervised:,} supervised) in {manifest.num_units:,} units; taps "
        f"{' '.join(manifest.taps)}: about {predicted / 1e6:,.1f} MB of {raw / 1e6:,.1f} MB raw",
        file=sys.stderr,
    )
