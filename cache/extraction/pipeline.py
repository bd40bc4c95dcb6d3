"""Extraction: one pass of the frozen base over a corpus, unit by unit, into a store.

The plan is written first, then units one by one; each is committed by its receipt. The same call
resumes: finished units are skipped, the others computed.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from carryon.cache.base.model import Base
from carryon.cache.checked_settings import Settings, apply_options
from carryon.cache.corpus.rows import Data
from carryon.cache.errors import InputError
from carryon.cache.extraction.aligned import plan_aligned, refuse_with_alignment, run_aligned
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.layout_writer import (
    append_plan,
    plan_files,
    refuse_large_plan,
    write_plan,
)
from carryon.cache.extraction.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.extraction.plan import ExtractionPlan, plan_extraction, reloaded_as_stored
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.extraction.resume import (
    refuse_known_data,
    refuse_other_data,
    refuse_other_settings,
)
from carryon.cache.extraction.sharing.claims import drop_claims
from carryon.cache.extraction.sharing.workers import (
    Sharing,
    check_backend,
    plan_sharing,
    run_together,
)
from carryon.cache.files.atomic import sweep_partials
from carryon.cache.format.manifest import Manifest, manifest_path, read_manifest
from carryon.cache.format.probe import Probe
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.lock import write_lock
from carryon.cache.settings import (
    CorpusSettings,
    DataSettings,
    ForwardSettings,
    RaySettings,
    StoreSettings,
)
from carryon.cache.store.reader import Store
from carryon.cache.store.sizes import raw_bytes
from carryon.cache.store.top_blocks import block_files

logger = logging.getLogger(__name__)

Errors = dict[str, dict[str, float]]
"""For each tap, errors by name, as in `Manifest.profile_error`."""

_EXPECTED_RATIO = {"exact": 0.68, "raw": 1.0, "near": 0.42, "compact": 0.36}
"""Stored bytes against raw, before anything is measured; --dry-run measures."""


def extract(
    *,
    base: str | Base,
    data: Data,
    out: str | Path,
    corpus: CorpusSettings | None = None,
    store: StoreSettings | None = None,
    forward: ForwardSettings | None = None,
    data_settings: DataSettings | None = None,
    append: bool = False,
    max_disk_bytes: int | None = None,
    held_out: Collection[str] = (),
    align_to: str | Path | None = None,
    drop_missing: bool = False,
    workers: int = 0,
    backend: Literal["transformers", "ray"] = "transformers",
    ray: RaySettings | None = None,
    **options: Any,  # noqa: ANN401
) -> Store:
    """Extract the hidden states of a corpus into the store at `out`, and open it.

    An existing store is resumed: only its missing units are computed.

    Example:
        store = extract(base="HuggingFaceTB/SmolLM2-135M-Instruct", data=rows, out="store")

    Args:
        base: hub id, folder or .gguf file; or a loaded base.
        data: a file, a folder or a hub id (`name:split`, `name@revision`), several of them, or
            rows: any iterable of dicts with `messages`, `prompt` and `completion`, `chosen` and
            `rejected`, or `text`, and perhaps `id` and `split`.
        out: folder of the store; made if missing.
        corpus: how text becomes samples. None: defaults.
        store: what the store holds. None: defaults.
        forward: how the base is run. None: defaults.
        data_settings: how the data are read. None: defaults.
        append: add the samples of `data` to an existing store.
        max_disk_bytes: stop before the store would grow beyond it. The store is then opened
            unfinished; the same call with more room resumes it.
        held_out: ids of records or samples to hold out, besides those marked in the data.
        align_to: a finished store of another base, made of the same data: the new store has its
            samples and rows, and at each row this base's state over exactly the text that is known
            there. Mask, lengths and units are those of that store.
        drop_missing: with `align_to`, leave out, and count, samples that only one of both has.
        workers: processes on this machine that claim units, this one counted; the same call with
            `workers` elsewhere on a shared file system joins them. 0: this process alone.
        backend: `ray`: the workers are actors of a Ray cluster; 0: as many as there is room for.
        ray: how actors of Ray take part. None: defaults.
        options: fields of the settings by name, such as `taps` or `unit_tokens`.

    Raises:
        InputError: data, tap or setting cannot be used; nothing was written.
        SettingMismatchError: the store was made with other settings; nothing was changed.
        StoreBusyError: another process writes to the store.
        DiskFullError: finished units are kept; the same call resumes.
    """
    corpus, store, forward, data_settings, ray = _with_options(
        options, corpus, store, forward, data_settings, ray
    )
    is_ray = check_backend(backend, ray)
    sharing, forward = plan_sharing(workers, forward, ray=ray if is_ray else None)
    inputs: dict[str, Any] = {
        "base": base,
        "data": data,
        "out": out,
        "corpus": corpus,
        "store": store,
        "forward": forward,
        "data_settings": data_settings,
        "is_shared": sharing is not None,
    }
    if align_to is not None:
        refuse_with_alignment(append=append, held_out=bool(held_out))
        aligned = plan_aligned(**inputs, align_to=align_to, drop_missing=drop_missing)
        report = run_aligned(aligned, max_disk_bytes=max_disk_bytes, sharing=sharing)
    elif drop_missing:
        raise InputError("drop_missing: expected align_to beside it. Fix: leave it out")
    else:
        plan = plan_extraction(**inputs, held_out=held_out)
        report = run_extraction(plan, append=append, max_disk_bytes=max_disk_bytes, sharing=sharing)
    is_cut = not report.is_finished
    if is_cut:
        logger.warning("%s: stopped at max_disk_bytes=%s, unfinished", out, max_disk_bytes)
    return Store.open(out, allow_unfinished=is_cut, allow_aligned=align_to is not None)


_SETTINGS = (CorpusSettings, StoreSettings, ForwardSettings, DataSettings, RaySettings)


def _with_options(options: Mapping[str, Any], *given: Settings | None) -> list[Any]:
    """Return settings of the classes `_SETTINGS`, those not given from options and defaults.

    Raises:
        InputError: an option is unknown or out of range, or its settings are given too.
    """
    for part in given:
        names = [item.name for item in fields(part)] if part is not None else []  # type: ignore[arg-type]
        if both := [name for name in options if name in names]:
            raise InputError(
                f"{both[0]}: expected it once, got it as an option and in "
                f"{type(part).__name__}. Fix: leave one of them out"
            )
    parts = [part or cls() for part, cls in zip(given, _SETTINGS, strict=True)]
    return apply_options(options, *parts)


def run_extraction(
    plan: ExtractionPlan,
    *,
    append: bool = False,
    max_disk_bytes: int | None = None,
    sharing: Sharing | None = None,
) -> ExtractReport:
    """Carry out a plan, or the missing rest of it; arguments and errors as of `extract`.

    Args:
        plan: to carry out.
        append: as of `extract`.
        max_disk_bytes: as of `extract`.
        sharing: how other processes take part. None: this one is alone.
    """
    root = plan.root
    logger.info(describe_size(plan.manifest))
    how: dict[str, Any] = {"batch_tokens": plan.batch_tokens, "max_disk_bytes": max_disk_bytes}
    limits: dict[str, Any] = {"append": append, "max_disk_bytes": max_disk_bytes}
    if sharing is not None:

        def prepare() -> tuple[Manifest, Base]:
            changes = reloaded_as_stored(root, plan.base, plan.manifest, plan.reload)
            own = replace(plan, **changes)
            return prepare_store(own, **limits, is_shared=True), own.base

        return run_together(root, prepare, sharing=sharing, **how)
    with write_lock(root):
        drop_claims(root)
        sweep_partials(root)
        manifest = prepare_store(plan, **limits)
        return run_units(root, manifest, plan.base, is_predicted=True, **how)


def prepare_store(
    plan: ExtractionPlan,
    *,
    append: bool,
    max_disk_bytes: int | None,
    is_shared: bool = False,
    check: Callable[[Probe | None], Errors] | None = None,
) -> Manifest:
    """Write the plan, or check that the store has the same one; the caller holds the write lock.

    Args:
        plan: to write.
        append: as of `extract`.
        max_disk_bytes: as of `extract`.
        is_shared: whether other processes may write to the store.
        check: as of `begin_store`; called without a probe where the store exists.
    """
    if manifest_path(plan.root).exists():
        if check is not None:
            check(None)
        return resume_store(plan, append=append, is_shared=is_shared)
    if append:
        raise InputError(
            f"{plan.root}: expected a store to append to, got none: leave out --append"
        )
    return begin_store(plan, max_disk_bytes, check=check)


def begin_store(
    plan: ExtractionPlan,
    max_disk_bytes: int | None,
    *,
    check: Callable[[Probe], Errors] | None = None,
) -> Manifest:
    """Write the plan of a new store.

    `check` may refuse what will be stored, given the probe, before anything is written; the
    errors that it measures are added to those of a lossy profile.
    """
    manifest = plan.manifest
    taps, profile = manifest.taps, manifest.settings["profile"]
    pilot = run_pilot(plan.base, taps, plan.samples, plan.units)
    errors = measure_profile(pilot, plan.head, taps=taps, profile=profile)
    probe = make_probe(pilot)
    for tap, measured in (check(probe) if check else {}).items():
        known = errors.setdefault(tap, {})
        for name, value in measured.items():
            known[name] = known.get(name, 0.0) + value
    manifest = replace(manifest, profile_error=errors)
    files = partial(
        plan_files,
        manifest,
        plan.samples,
        plan.units,
        head=plan.head,
        probe=probe,
        blocks=block_files(plan.base, manifest.num_blocks),
        skipped=plan.skipped,
    )
    refuse_large_plan(files(), max_disk_bytes, root=plan.root)
    return write_plan(plan.root, manifest, files())


def resume_store(plan: ExtractionPlan, *, append: bool, is_shared: bool = False) -> Manifest:
    """Check that the existing store is of this plan, or append the plan to it."""
    root, old, new = plan.root, read_manifest(plan.root), plan.manifest
    if old.alignment:
        raise InputError(
            f"{root}: expected a store of its own, got one that is aligned to the store "
            f"{old.alignment['anchor'][:12]}. Fix: give its --align-to, without --append, or "
            "another --out"
        )
    refuse_other_settings(old, new, name=str(root))
    [part] = new.parts
    if not append:
        refuse_other_data(old, new, name=str(root))
        return old
    is_known = part.fingerprint in [known.fingerprint for known in old.parts]
    is_last = part.fingerprint == old.parts[-1].fingerprint and len(old.parts) > 1
    if is_shared and is_last:
        return old  # another process that shares the store has appended it, and perhaps finished
    if is_known and not units_with_receipt(root).issuperset(range(old.num_units)):
        return old  # an append that was interrupted
    refuse_known_data(old, new, name=str(root))
    part = replace(part, first_unit=old.num_units, first_sample=old.num_samples)
    new = replace(old, parts=[*old.parts, part])
    return append_plan(root, old, new, plan.samples, plan.units, skipped=plan.skipped)


def describe_size(manifest: Manifest) -> str:
    """Return a line on the samples and bytes of a store, before anything is measured."""
    raw = raw_bytes(manifest, manifest.num_tokens)
    predicted = raw * _EXPECTED_RATIO[manifest.settings["profile"]]
    return (
        f"{manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens "
        f"({manifest.num_supervised:,} supervised) in {manifest.num_units:,} units; taps "
        f"{' '.join(manifest.taps)}: about {predicted / 1e6:,.1f} MB of {raw / 1e6:,.1f} MB raw"
    )
