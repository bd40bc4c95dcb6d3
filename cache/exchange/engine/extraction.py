"""Extraction whose forward passes are vLLM's: the same plan, units, receipts and claims as here.

Files of states appear in a folder, are checked, packed into units and removed. A few samples are
compared with the base, which is loaded here too, before the plan is written and at each resume.
"""

import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from carryon.cache.base.model import Base
from carryon.cache.corpus.rows import Data
from carryon.cache.errors import InputError
from carryon.cache.exchange.agreement import check_first_states
from carryon.cache.exchange.engine.endpoint import Endpoint
from carryon.cache.exchange.engine.local import EngineJob, LocalEngine
from carryon.cache.exchange.engine.planning import VllmPlan, plan_with_vllm
from carryon.cache.exchange.engine.requests import Engine
from carryon.cache.exchange.engine.settings import (
    VllmSettings,
    check_measured,
)
from carryon.cache.exchange.engine.staging import staging_folder
from carryon.cache.exchange.engine.states import Columns, EngineStates, FirstFiles
from carryon.cache.exchange.state_file import read_facts
from carryon.cache.exchange.taps import forward_facts
from carryon.cache.extraction.forward import run_units, units_to_do
from carryon.cache.extraction.pilot import PILOT_TOKENS
from carryon.cache.extraction.pipeline import Errors, describe_size, prepare_store, resume_store
from carryon.cache.extraction.plan import ExtractionPlan
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.extraction.sharing.claims import drop_claims
from carryon.cache.extraction.sharing.workers import Sharing, run_together
from carryon.cache.files.atomic import sweep_partials
from carryon.cache.format.manifest import Manifest, manifest_path
from carryon.cache.format.probe import Probe
from carryon.cache.lock import write_lock
from carryon.cache.progress import Progress
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import UnitInput

logger = logging.getLogger(__name__)


def run_with_vllm(
    plan: VllmPlan,
    *,
    append: bool = False,
    max_disk_bytes: int | None = None,
    sharing: Sharing | None = None,
) -> ExtractReport:
    """Carry out a plan, or the missing rest of it; arguments and errors as of `run_extraction`.

    Raises:
        EngineError: vLLM failed; finished units are kept, the same call resumes.
    """
    root, base = plan.extraction.root, plan.extraction.base
    if sharing is not None and sharing.workers > 1:
        raise InputError(
            f"--workers: expected 1 with vLLM, which fills a machine by itself, got "
            f"{sharing.workers}. Fix: --workers 1, on each node of a shared file system"
        )
    logger.info(describe_size(plan.extraction.manifest))
    how: dict[str, Any] = {
        "batch_tokens": plan.extraction.batch_tokens,
        "max_disk_bytes": max_disk_bytes,
    }
    with ExitStack() as stack:
        run = _Run(plan, stack, is_shared=sharing is not None)
        prepare = partial(run.prepare, append=append, max_disk_bytes=max_disk_bytes)
        if sharing is not None:
            return run_together(
                root,
                lambda: (prepare(), base),
                sharing=sharing,
                states_of=run.states_of,
                **how,
            )
        with write_lock(root):
            drop_claims(root)
            sweep_partials(root)
            manifest = prepare()
            units = units_to_do(root, manifest)
            return run_units(root, manifest, base, units=units, states_of=run.states_of, **how)


class _Run:
    """An extraction that is carried out: the engine is started when the lock is held."""

    def __init__(self, plan: VllmPlan, stack: ExitStack, *, is_shared: bool) -> None:
        """Prepare; nothing is started. `stack` ends the engine."""
        self._plan, self._stack, self._is_shared = plan, stack, is_shared
        self._engine: Engine | None = None
        self._states: EngineStates | None = None

    def prepare(self, *, append: bool, max_disk_bytes: int | None) -> Manifest:
        """Start the engine, compare it with the base, and write the plan; see `prepare_store`."""
        job, vllm = self._plan.job, self._plan.vllm
        root = self._plan.extraction.root
        if job is not None and not append and manifest_path(root).exists():
            # refused, or nothing to do: known before vLLM starts
            manifest = resume_store(
                self._complete(self._known_columns(job), version=""), append=False
            )
            if not units_to_do(root, manifest):
                return manifest
        engine = self._engine = self._engine or self._open()
        columns = self._known_columns(job) if job is not None else self._first_columns(engine)
        columns.check_taps(self._plan.extraction.manifest.taps)
        plan = self._complete(columns, version=engine.version)
        how: dict[str, Any] = {"taps": plan.manifest.taps, "head": plan.head}
        files = FirstFiles(engine, columns, plan.samples, plan.units, **how)

        def check(probe: Probe | None) -> Errors:
            return check_first_states(
                plan.base, plan.units, files, probe=probe, max_error=vllm.max_error
            )

        manifest = prepare_store(
            plan,
            append=append,
            max_disk_bytes=max_disk_bytes,
            is_shared=self._is_shared,
            check=check,
        )
        self._states = EngineStates(
            plan.root,
            manifest,
            engine,
            columns,
            head=plan.head,
            requests=vllm.requests,
            units=[] if self._is_shared else units_to_do(plan.root, manifest),
        )
        return manifest

    def states_of(self, unit: UnitInput, progress: Progress) -> dict[str, NDArray[Any]]:
        """Return the states of a unit."""
        assert self._states is not None
        return self._states(unit, progress)

    def _open(self) -> Engine:
        vllm, job = self._plan.vllm, self._plan.job
        if job is None:
            plan = self._plan.extraction
            longest = int(plan.samples.lengths.max())
            source = plan.base.source
            asked = Endpoint(self._plan.endpoint, model=source, longest=longest, vllm=vllm)
            return self._stack.enter_context(asked)
        folder = self._stack.enter_context(staging_folder(self._plan.extraction.root))
        started_at = time.perf_counter()
        engine = self._stack.enter_context(
            LocalEngine(
                job, python=self._plan.python, folder=folder, timeout_s=vllm.request_timeout_s
            )
        )
        check_measured(dict(job.more), version=engine.version)
        elapsed_s = time.perf_counter() - started_at
        logger.info(f"vLLM {engine.version} is ready after {elapsed_s:.0f} s")
        return engine

    def _complete(self, columns: Columns, *, version: str) -> ExtractionPlan:
        """Return the plan with what the manifest says of an engine."""
        plan = self._plan.extraction
        facts = forward_facts(columns.layers, num_layers=columns.num_layers, dtype=columns.dtype)
        versions = plan.manifest.versions | {"vllm": version}
        return replace(plan, manifest=replace(plan.manifest, forward=facts, versions=versions))

    def _known_columns(self, job: EngineJob) -> Columns:
        """Return what the files of an engine that is started here hold."""
        return Columns(layers=list(job.layers), dtype=job.dtype, **self._sizes())

    def _first_columns(self, engine: Engine) -> Columns:
        """Return what the files of a server hold, from the first one."""
        plan = self._plan.extraction
        tokens = plan.samples[int(plan.units.order[0])].tokens[:PILOT_TOKENS]
        name = engine.submit(tokens.tolist()).result()
        facts = read_facts(engine.folder, name, is_locked=True)
        engine.discard(name)
        return Columns.of_file(facts, layers=self._plan.vllm.layer_ids, **self._sizes())

    def _sizes(self) -> dict[str, int]:
        plan = self._plan.extraction
        return {"num_layers": plan.base.identity.num_layers, "width": plan.manifest.width}


def extract_with_vllm(
    *,
    base: str | Base,
    data: Data,
    out: str | Path,
    vllm: VllmSettings | None = None,
    endpoint: str = "",
    corpus: CorpusSettings | None = None,
    store: StoreSettings | None = None,
    forward: ForwardSettings | None = None,
    data_settings: DataSettings | None = None,
    append: bool = False,
    max_disk_bytes: int | None = None,
) -> Store:
    """Extract as `carryon.cache.extract` does, with vLLM in place of transformers.

    Example:
        vllm = VllmSettings(vllm_python="ENV/bin/python")
        store = extract_with_vllm(base="BASE", data=rows, out="store", vllm=vllm)

    Args:
        base: as of `extract`; loaded here too, on the CPU unless `forward` says otherwise.
        data: as of `extract`.
        out: as of `extract`.
        vllm: how vLLM is run or asked. None: defaults.
        endpoint: address of a server that runs the base. Empty: vLLM is started here.
        corpus: as of `extract`.
        store: as of `extract`.
        forward: as of `extract`; `compute_dtype` and `batch_tokens` are vLLM's too.
        data_settings: as of `extract`.
        append: as of `extract`.
        max_disk_bytes: as of `extract`.

    Raises:
        EngineError: vLLM failed; finished units are kept, the same call resumes.
        InputError: states are not those of the base, or as of `extract`.
    """
    plan = plan_with_vllm(
        base=base,
        data=data,
        out=out,
        vllm=vllm or VllmSettings(),
        endpoint=endpoint,
        corpus=corpus or CorpusSettings(),
        store=store or StoreSettings(),
        forward=forward or ForwardSettings(),
        data_settings=data_settings or DataSettings(),
    )
    report = run_with_vllm(plan, append=append, max_disk_bytes=max_disk_bytes)
    return Store.open(out, allow_unfinished=not report.is_finished)
