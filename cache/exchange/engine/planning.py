"""The plan of an extraction by vLLM: settings checked, data read, samples packed into units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.base.identity import ON_LOAD
from carryon.cache.base.model import Base
from carryon.cache.base.source.location import BaseSource, locate_base
from carryon.cache.corpus.rows import Data
from carryon.cache.errors import InputError
from carryon.cache.exchange.engine.local import EngineJob
from carryon.cache.exchange.engine.settings import VllmSettings, parse_engine_args
from carryon.cache.exchange.engine.vllm_process import find_python
from carryon.cache.exchange.layers import layer_of
from carryon.cache.extraction.plan import ExtractionPlan, plan_extraction
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmPlan:
    """Everything that is known before vLLM is started or asked."""

    extraction: ExtractionPlan
    """Its manifest is completed once the engine is known."""
    vllm: VllmSettings
    endpoint: str
    """Address of a server. Empty: vLLM is started here."""
    job: EngineJob | None
    """What is started here. None: nothing."""
    python: str
    """That runs it."""


def plan_with_vllm(
    *,
    base: str | Base,
    data: Data,
    out: str | Path,
    vllm: VllmSettings,
    endpoint: str,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    data_settings: DataSettings,
    is_shared: bool = False,
) -> VllmPlan:
    """Check the settings, read the data, load the base, and pack samples into units.

    Arguments are those of `extract_with_vllm`; `is_shared` and errors as of `plan_extraction`.

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: a setting cannot be used.
    """
    _check_settings(vllm, endpoint)
    _check_forward(base, forward)
    python = "" if endpoint else find_python(vllm.vllm_python)
    more = parse_engine_args(vllm.vllm_args)
    source = base.source if isinstance(base, Base) else str(base)
    place = locate_base(source)
    if place.gguf_file is not None:
        raise InputError(
            f"base {source}: expected a folder or a hub id, which vLLM reads, got a .gguf file. "
            f"Fix: carryon convert {source} --out FOLDER"
        )
    if forward.device == "auto" and not forward.device_map:
        forward = replace(forward, device="cpu")  # accelerators are vLLM's
    plan = plan_extraction(
        base=base,
        data=data,
        out=out,
        corpus=corpus,
        store=store,
        forward=forward,
        data_settings=data_settings,
        is_shared=is_shared,
    )
    dtype = forward.compute_dtype
    job = None if endpoint else _job(plan, place, vllm, compute_dtype=dtype, more=more)
    return VllmPlan(extraction=plan, vllm=vllm, endpoint=endpoint, job=job, python=python)


def _job(
    plan: ExtractionPlan,
    place: BaseSource,
    vllm: VllmSettings,
    *,
    compute_dtype: str,
    more: Mapping[str, Any],
) -> EngineJob:
    """Return what vLLM runs here for the states that the plan needs; `more` is of `EngineJob`."""
    saved_dtype = str(plan.base.checkpoint_dtype).removeprefix("torch.")
    return EngineJob(
        model=place.name,
        revision=place.revision,
        layers=asked_layers(plan.manifest.taps, num_layers=plan.base.identity.num_layers),
        dtype=saved_dtype if compute_dtype == "auto" else compute_dtype,
        longest=int(plan.samples.lengths.max()),
        batch_tokens=plan.batch_tokens,
        requests=vllm.requests,
        more=more,
    )


def asked_layers(taps: Sequence[str], *, num_layers: int) -> list[int]:
    """Return the layer ids that give the taps, ascending, each once."""
    return sorted(
        {num_layers if tap == "final" else layer_of(tap, num_layers=num_layers) for tap in taps}
    )


def _check_forward(base: str | Base, forward: ForwardSettings) -> None:
    """Check that vLLM runs the base as it is recorded: dense, or as its checkpoint is."""
    quantization = base.identity.quantization if isinstance(base, Base) else forward.quantize
    given = {
        f"--quantize {quantization}": quantization in ON_LOAD,
        "--device-map": bool(forward.device_map),
        "--trust-remote-code": forward.trust_remote_code,
    }
    for option in [name for name, is_given in given.items() if is_given]:
        raise InputError(
            f"{option}: expected it for --backend transformers, got vllm, which loads the base "
            "itself. Fix: leave it out"
        )


def _check_settings(vllm: VllmSettings, endpoint: str) -> None:
    """Check that no option is given that the way of running vLLM has no use for."""
    served = {"states_folder": vllm.states_folder, "layer_ids": vllm.layer_ids}
    local = {"vllm_python": vllm.vllm_python, "vllm_args": vllm.vllm_args}
    for name in [name for name, value in (local if endpoint else served).items() if value]:
        where = "vLLM that is started here" if endpoint else "--endpoint"
        raise InputError(
            f"--{name.replace('_', '-')}: expected it for {where} only. Fix: leave it out"
        )
    if endpoint and not vllm.states_folder:
        raise InputError(
            "--states-folder: expected the folder that the server writes states to, its "
            "shared_storage_path, got nothing. Fix: --states-folder FOLDER"
        )
