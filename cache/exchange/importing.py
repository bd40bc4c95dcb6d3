"""Import of hidden states that other programs wrote to files: into a store, unit by unit.

The plan is written first, as by an extraction; units are then filled from files, a file in memory
at a time, and committed by receipts. The same call resumes.
Letters: S samples, T tokens of a sample, L columns, D base width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base, load_base
from carryon.cache.corpus.rows import Data
from carryon.cache.errors import SettingMismatchError
from carryon.cache.exchange.agreement import FirstStates, check_first_states
from carryon.cache.exchange.file_samples import FileSamples
from carryon.cache.exchange.folder import list_folder
from carryon.cache.exchange.layers import column_taps, stored_taps
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.exchange.state_file import StateFile, read_states
from carryon.cache.exchange.taps import forward_facts, tap_states
from carryon.cache.exchange.units import ImportReport, fill_units
from carryon.cache.extraction.pipeline import Errors, prepare_store
from carryon.cache.extraction.plan import ExtractionPlan, look_up_facts, plan_extraction
from carryon.cache.files.atomic import sweep_partials
from carryon.cache.format.manifest import CorpusPart, Manifest
from carryon.cache.format.probe import Probe
from carryon.cache.lock import write_lock
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportPlan:
    """Everything that is known before states are read."""

    extraction: ExtractionPlan
    """Samples, units and manifest of a new store."""
    folder: Path
    """Of the files."""
    files: Sequence[StateFile]
    of_sample: NDArray[np.int64]
    """[S] index, in `files`, of the file of each sample."""
    layers: list[int]
    """[L] layer id of each column."""
    dtype: str
    """Of the states in the files."""
    max_error: float


def plan_import(
    folder: str | Path,
    *,
    base: str | Base,
    out: str | Path,
    data: Data = (),
    states: str | Path | None = None,
    drop_missing: bool = False,
    imports: ImportSettings | None = None,
    corpus: CorpusSettings | None = None,
    forward: ForwardSettings | None = None,
    data_settings: DataSettings | None = None,
) -> ImportPlan:
    """Read everything of the files but their states, and pack their samples into units.

    `out`, `corpus` and `data_settings` are those of `extract`.

    Args:
        folder: with the files, or with a data set of speculators.
        base: that computed the states.
        data: the corpus that the nodes were given: samples, masks and ids are then its own. Empty:
            those of the data set, or every token of every file a target.
        states: folder of the files, where they are not in the data set's `hidden_states`.
        drop_missing: leave out, and count, samples without a file.
        imports: what the files hold.
        forward: how the base is run for the check of a few samples.

    Raises:
        InputError: a file or setting cannot be used; names it.
        MissingError: there is no such folder.
        StoreBusyError: another process writes to the store.
    """
    imports, forward = imports or ImportSettings(), forward or ForwardSettings()
    listed = list_folder(Path(folder), Path(states) if states else None)
    base, num_layers = _with_sizes(base, forward)
    samples = FileSamples(listed, imports, drop_missing=drop_missing)
    layers, dtype = samples.layers, samples.dtype
    plan = plan_extraction(
        base=base,
        data=data,
        out=out,
        corpus=corpus or CorpusSettings(),
        store=_store_settings(imports, layers, num_layers=num_layers, dtype=dtype),
        forward=forward,
        data_settings=data_settings or DataSettings(),
        choose=lambda read, facts: samples.read(facts, read() if data else None),
    )
    how = forward_facts(layers, num_layers=num_layers, dtype=dtype)
    return ImportPlan(
        extraction=replace(plan, manifest=replace(plan.manifest, forward=how)),
        folder=listed.states,
        files=samples.files,
        of_sample=samples.of_sample,
        layers=layers,
        dtype=dtype,
        max_error=imports.max_error,
    )


def _with_sizes(base: str | Base, forward: ForwardSettings) -> tuple[str | Base, int]:
    """Return the base, loaded only where its config does not name its sizes, and how many blocks
    it has."""
    facts = look_up_facts(base, forward)
    if facts.num_layers is not None and facts.width is not None:
        return base, facts.num_layers
    loaded = load_base(str(base), forward=forward)
    return loaded, loaded.identity.num_layers


def _store_settings(
    imports: ImportSettings, layers: Sequence[int], *, num_layers: int, dtype: str
) -> StoreSettings:
    """Return the settings of the store of files with states of these layers, of a dtype.

    Raises:
        InputError: layer ids or taps are not those of a base of `num_layers` blocks.
    """
    columns = column_taps(layers, num_layers=num_layers)
    return StoreSettings(
        taps=stored_taps(imports.taps, columns, num_layers=num_layers),
        profile=imports.profile,
        dtype=dtype if imports.dtype == "auto" else imports.dtype,  # type: ignore[arg-type]
        unit_tokens=imports.unit_tokens,
        seed=imports.seed,
    )


def run_import(
    plan: ImportPlan, *, append: bool = False, max_disk_bytes: int | None = None
) -> ImportReport:
    """Carry out a plan, or the missing rest of it.

    Raises:
        InputError: states are not those of the base, or a file cannot be used; names it. Units
            that were committed are kept.
        SettingMismatchError: the store was made with other settings or files.
        StoreBusyError: another process writes to the store.
        DiskFullError: finished units are kept; the same call resumes.
    """
    root, new = plan.extraction.root, plan.extraction.manifest
    with write_lock(root):
        sweep_partials(root)
        manifest = prepare_store(
            plan.extraction,
            append=append,
            max_disk_bytes=max_disk_bytes,
            check=lambda probe: _check_files(plan, probe),
        )
        part = _own_part(manifest, new.parts[0], name=str(root))
        return fill_units(
            root,
            manifest,
            part,
            plan.folder,
            lambda position: plan.files[plan.of_sample[plan.extraction.units.order[position]]],
            lambda file, tokens, memory: _read_taps(plan, file, tokens, memory),
            max_disk_bytes=max_disk_bytes,
        )


def _own_part(manifest: Manifest, new: CorpusPart, *, name: str) -> CorpusPart:
    """Return the part of a store that was planned from the same samples and files."""
    [part] = [each for each in manifest.parts if each.fingerprint == new.fingerprint]
    before, now = (each.files[-1]["sha256"] for each in (part, new))
    if before != now:
        raise SettingMismatchError(
            f"{name}: files: expected those that the import began with, got others of the same "
            "samples. Fix: give the same files, or another --out"
        )
    return part


def _check_files(plan: ImportPlan, probe: Probe | None) -> Errors:
    """Compare some files, and those of the probe's rows, with the base."""
    units, samples = plan.extraction.units, plan.extraction.samples

    def read(position: int, stop: int) -> FirstStates:
        number = int(units.order[position])
        file = plan.files[plan.of_sample[number]]
        tokens = samples[number].tokens
        taps = _read_taps(plan, file, tokens, np.empty(file.num_bytes, np.uint8))
        states = {tap: widen(rows[:stop]) for tap, rows in taps.items()}
        return str(plan.folder / file.name), tokens[:stop], states

    return check_first_states(
        plan.extraction.base, units, read, probe=probe, max_error=plan.max_error
    )


def _read_taps(
    plan: ImportPlan, file: StateFile, tokens: NDArray[np.int32], memory: NDArray[np.uint8]
) -> dict[str, NDArray[Any]]:
    """Return the states of a file at each tap of the store, [T, D]: views of `memory`, in the
    type of the file, and `final` as float32."""
    manifest, head = plan.extraction.manifest, plan.extraction.head
    num_layers = plan.extraction.base.identity.num_layers
    states = read_states(
        plan.folder,
        file,
        token_ids=tokens,
        shape=(len(plan.layers), manifest.width),
        dtype=plan.dtype,
        memory=memory,
    )
    return {
        tap: tap_states(states, tap, plan.layers, num_layers=num_layers, head=head)
        for tap in manifest.taps
    }
