"""Extraction of a store that is aligned to another one: the same rows, another base's states.

The plan is written first, then units one by one, as in any extraction; the same call resumes.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.alignment.tree import needed_nodes
from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.lm_head import Head
from carryon.cache.base.model import Base, read_head
from carryon.cache.base.quantizers import quantizer_version
from carryon.cache.corpus.rows import Data
from carryon.cache.errors import InputError
from carryon.cache.extraction.aligned_forward import check_tree_forward, tree_inputs
from carryon.cache.extraction.aligned_plan import (
    Alignment,
    align_to_anchor,
    keep_settings,
    open_anchor,
    refuse_other_alignment,
)
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.layout_writer import (
    array_documents,
    refuse_large_plan,
    write_plan,
)
from carryon.cache.extraction.pilot import PILOT_TOKENS, PilotSample, make_probe, measure_profile
from carryon.cache.extraction.plan import (
    Reload,
    forward_facts,
    keep_compute_dtype,
    load_to_extract,
    refuse_foreign_folder,
    reloaded_as_stored,
)
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.extraction.resume import refuse_other_data, refuse_other_settings
from carryon.cache.extraction.sharing.claims import drop_claims
from carryon.cache.extraction.sharing.workers import Sharing, run_together
from carryon.cache.files.atomic import sweep_partials
from carryon.cache.files.documents import json_bytes
from carryon.cache.format.alignment import encode_alignment
from carryon.cache.format.arrays import read_file
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.head_arrays import encode_head, head_facts
from carryon.cache.format.manifest import Manifest, manifest_path, read_manifest
from carryon.cache.format.probe import Probe, encode_probe
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    chunk_rows,
    group_document,
    row_path,
)
from carryon.cache.lock import refuse_busy, write_lock
from carryon.cache.settings import (
    CorpusSettings,
    DataSettings,
    ForwardSettings,
    StoreSettings,
    parse_tap,
)
from carryon.cache.store.reader import Store
from carryon.cache.store.top_blocks import block_files
from carryon.cache.versions import library_versions

logger = logging.getLogger(__name__)

_PILOT_SAMPLES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedPlan:
    """Everything that is known before the base runs."""

    root: Path
    anchor: Store
    base: Base
    head: Head
    alignment: Alignment
    batch_tokens: int
    manifest: Manifest
    """Of a new store."""
    reload: Reload | None
    """As of ExtractionPlan."""


def plan_aligned(
    *,
    base: str | Base,
    data: Data,
    align_to: str | Path,
    out: str | Path,
    corpus: CorpusSettings | None = None,
    store: StoreSettings | None = None,
    forward: ForwardSettings | None = None,
    data_settings: DataSettings | None = None,
    drop_missing: bool = False,
    is_shared: bool = False,
) -> AlignedPlan:
    """Align a base with the samples of a store; nothing is written.

    Args:
        base: hub id, folder or .gguf file; or a loaded base.
        data: the records that the anchor was made of.
        align_to: the anchor's folder.
        out: folder of the new store.
        corpus: chat template, its variables and date for this base; all else is the anchor's.
        store: taps, profile and type; units and seed are the anchor's.
        forward: how the base is run.
        data_settings: how the data are read.
        drop_missing: leave out, and count, samples that only one of anchor and data has.
        is_shared: whether other processes may be at work on the store.

    Raises:
        InputError: anchor, data or base cannot be used; see `align_to_anchor`.
        StoreBusyError: another process writes to the store.
    """
    root, forward = Path(out), forward or ForwardSettings()
    corpus, store = corpus or CorpusSettings(), store or StoreSettings()
    refuse_foreign_folder(root)
    refuse_busy(root, is_shared=is_shared)
    anchor = open_anchor(align_to)
    store = keep_settings(anchor, corpus, store)
    loaded, reload = load_to_extract(base, keep_compute_dtype(forward, root))
    for tap in store.taps:
        parse_tap(tap, num_layers=loaded.identity.num_layers)
    check_tree_forward(loaded)
    alignment = align_to_anchor(
        anchor,
        loaded,
        data,
        corpus=corpus,
        data_settings=data_settings or DataSettings(),
        drop_missing=drop_missing,
    )
    head = read_head(loaded)
    return AlignedPlan(
        root=root,
        anchor=anchor,
        base=loaded,
        head=head,
        alignment=alignment,
        batch_tokens=forward.batch_tokens,
        manifest=_manifest(anchor, loaded, head, alignment, store),
        reload=reload,
    )


def _manifest(
    anchor: Store, base: Base, head: Head, alignment: Alignment, store: StoreSettings
) -> Manifest:
    width = base.identity.width
    row_bytes = width * STATE_TYPES[store.dtype].itemsize
    return Manifest(
        base=base.identity.to_dict(),
        forward=forward_facts(base),
        corpus=anchor.manifest.corpus,
        settings=store.to_dict(),
        parts=anchor.manifest.parts,
        width=width,
        rows_per_chunk=chunk_rows(row_bytes=row_bytes, unit_tokens=store.unit_tokens),
        head=head_facts(head),
        versions=library_versions() | quantizer_version(base.identity.quantization),
        alignment=alignment.facts,
    )


def refuse_with_alignment(
    *, append: bool = False, held_out: bool = False, dry_run: bool = False
) -> None:
    """Check that nothing is asked for that an aligned store has from its anchor.

    Raises:
        InputError: names the option.
    """
    for option, is_given in (("append", append), ("held-out", held_out), ("dry-run", dry_run)):
        if is_given:
            raise InputError(
                f"--align-to: expected no --{option} beside it, as samples and rows are the "
                f"anchor's, got --{option}. Fix: leave one of them out"
            )


def run_aligned(
    plan: AlignedPlan, *, max_disk_bytes: int | None = None, sharing: Sharing | None = None
) -> ExtractReport:
    """Carry out a plan, or the missing rest of it.

    Args:
        plan: to carry out.
        max_disk_bytes: stop before the store would grow beyond it. None: no limit.
        sharing: how other processes take part. None: this one is alone.

    Raises:
        InputError: the plan is larger than `max_disk_bytes`; nothing was written.
        SettingMismatchError: the store was made with other settings; nothing was changed.
        DiskFullError: finished units are kept; the same call resumes.
    """
    root = plan.root
    nodes, rows = int(plan.alignment.num_nodes.sum()), plan.manifest.num_tokens
    logger.info(f"{rows:,} tokens of {plan.anchor.name}, read in {nodes:,} tokens of this base")
    how: dict[str, Any] = {"batch_tokens": plan.batch_tokens, "max_disk_bytes": max_disk_bytes}
    if sharing is not None:
        prepare = partial(_prepare_shared, plan, max_disk_bytes)
        return run_together(root, prepare, sharing=sharing, **how)
    with write_lock(root):
        drop_claims(root)
        sweep_partials(root)
        manifest = _prepare(plan, max_disk_bytes)
        return run_units(root, manifest, plan.base, is_predicted=True, **how)


def _prepare_shared(plan: AlignedPlan, max_disk_bytes: int | None) -> tuple[Manifest, Base]:
    """Write the plan, or check it, in the compute dtype that another process has chosen."""
    changes = reloaded_as_stored(plan.root, plan.base, plan.manifest, plan.reload)
    plan = replace(plan, **changes)
    return _prepare(plan, max_disk_bytes), plan.base


def _prepare(plan: AlignedPlan, max_disk_bytes: int | None) -> Manifest:
    """Write the plan, or check that the store has the same one."""
    root = plan.root
    if manifest_path(root).exists():
        manifest = read_manifest(root)
        refuse_other_settings(manifest, plan.manifest, name=str(root))
        refuse_other_alignment(manifest.alignment, plan.manifest.alignment, name=str(root))
        refuse_other_data(manifest, plan.manifest, name=str(root))
        return manifest
    pilot = _run_pilot(plan)
    settings = plan.manifest.settings
    errors = measure_profile(pilot, plan.head, taps=plan.manifest.taps, profile=settings["profile"])
    manifest = replace(plan.manifest, profile_error=errors)
    files = partial(_files, plan, manifest, make_probe(pilot))
    refuse_large_plan(files(), max_disk_bytes, root=root)
    return write_plan(root, manifest, files())


def _files(plan: AlignedPlan, manifest: Manifest, probe: Probe) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of the plan but its manifest."""
    anchor, alignment = plan.anchor, plan.alignment
    for number in range(anchor.num_units):
        unit = anchor.read_unit(number, taps=[])
        for name in ROW_ARRAYS:
            yield row_path(name, number), encode_chunk(getattr(unit, name))
    known = anchor.manifest.files
    for path in known:
        if path.startswith(("samples/", "units/")) and path != "samples/zarr.json":
            yield path, read_file(anchor.root, path, digests=known)
    yield from encode_head(plan.head)
    yield from block_files(plan.base, manifest.num_blocks).items()
    yield from encode_alignment(
        alignment.units,
        alignment.num_nodes,
        unit_tokens=manifest.unit_tokens,
        unit_nodes=alignment.unit_nodes,
    )
    yield "aligned/zarr.json", json_bytes(group_document())
    yield from encode_probe(probe)
    yield from array_documents(manifest).items()


def _run_pilot(plan: AlignedPlan) -> list[PilotSample]:
    """Run the base over the beginnings of a few trees of one unit."""
    pilot: list[PilotSample] = []
    num_nodes, anchor = plan.alignment.num_nodes, plan.anchor
    for number, unit in enumerate(plan.alignment.units):
        for sample in anchor.unit_samples(number):
            first = int(anchor.sample_starts[sample])
            within = first - number * anchor.unit_tokens
            rows = np.arange(within, within + int(anchor.sample_lengths[sample]))
            rows = rows[unit.exact[rows] >= 0][:PILOT_TOKENS]
            if not num_nodes[sample] or not len(rows) or len(pilot) == _PILOT_SAMPLES:
                continue
            rows = rows[: int(np.argmin(np.diff(rows, append=-1) == 1)) + 1]  # without a gap
            pilot.append(_pilot_sample(plan, number, rows))
        if pilot:
            return pilot
    raise InputError(f"{plan.anchor.name}: expected a sample in the data, got none")


def _pilot_sample(plan: AlignedPlan, number: int, rows: NDArray[np.int64]) -> PilotSample:
    unit, taps = plan.alignment.units[number], plan.manifest.taps
    kept = needed_nodes(unit.parents, unit.exact[rows])
    places = np.cumsum(kept) - 1
    parents = unit.parents[kept]
    parents = np.where(parents >= 0, places[parents], -1).astype(np.int32)
    ids = torch.from_numpy(unit.tokens[kept].astype(np.int64))[None]
    inputs = tree_inputs(plan.base, [parents])
    run_taps = list(dict.fromkeys([*(tap for tap in taps if tap != "stable"), "final"]))
    states = capture(plan.base, run_taps, ids, inputs)
    logits = base_logits(plan.base, ids, inputs)[0].float().cpu()
    exact, stable = places[unit.exact[rows]], unit.stable[rows]
    found = {tap: values[0].float().cpu().numpy()[exact] for tap, values in states.items()}
    if "stable" in taps:
        final = states["final"][0].float().cpu().numpy()
        found["stable"] = np.where(stable[:, None] >= 0, final[places[np.maximum(stable, 0)]], 0)
    return PilotSample(
        first_row=number * plan.manifest.unit_tokens + int(rows[0]),
        states=found,
        logits=logits[exact],
    )
