"""Extraction on an accelerator against the bare forward passes, with random bases of real widths.

No base is loaded and nothing is downloaded. What is compared: the decoder alone over batches sorted
by length, and `run_units`, which also copies, encodes, writes, syncs and commits; both with the
blocks as they are and compiled.
"""

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from carryon.cache.base.model import Base
from carryon.cache.device import attention_of_any_shape
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.format.manifest import Manifest
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.extract import measure_extraction, run_bare
from carryon.tools.bench.job import Job, synchronize
from carryon.tools.bench.made_base import random_base
from carryon.tools.bench.pipeline import fast_folder
from carryon.tools.bench.scratch import plan_scratch
from carryon.tools.bench.states import StateSet, make_states

TARGET = 0.97
_MOST_UNITS = 64
_FEWEST_UNITS = 4
logger = logging.getLogger(__name__)


def measure_gpu_extraction(
    job: Job,
    *,
    widths: tuple[int, ...] = (1024, 2048, 4096),
    unit_tokens: int = 16_384,
    batch_tokens: int = 16_384,
    mean_tokens: int = 512,
    max_tokens: int = 2048,
    seconds: float = 1.6,
    rounds: int = 2,
    budget_s: float = 55.0,
    device: str = "cuda",
) -> None:
    """Report tokens/s of extraction against the bare forward, for each width, compiled and not.

    `seconds` is what a way takes about. Compiled blocks are left out, with a word, once `budget_s`
    is nearly spent. With --base also that base, as `store.extract`.
    """
    end_at = time.perf_counter() + budget_s
    bases, measure = (
        {},
        partial(
            _measure,
            job,
            unit_tokens=unit_tokens,
            batch_tokens=batch_tokens,
            mean_tokens=mean_tokens,
            max_tokens=max_tokens,
            seconds=seconds,
            rounds=rounds,
        ),
    )
    for width in widths:
        started_at = time.perf_counter()
        bases[width] = random_base(width, device=torch.device(device), context=max_tokens)
        made_s = round(time.perf_counter() - started_at, 2)
        measure(bases[width], "gpu.extract", made_s=made_s)
    for width, base in bases.items():
        started_at = time.perf_counter()
        if (left_s := end_at - started_at) < 4 * rounds * seconds:
            logger.warning(f"gpu.extract: D {width}: not compiled, {left_s:.0f} s are left")
            continue
        try:
            _compile(base, batch_tokens=batch_tokens, max_tokens=max_tokens)
        except Exception as error:  # whatever a compiler lacks on a machine
            logger.warning(f"gpu.extract: D {width}: not compiled: {error!s:.300}")
            continue
        compile_s = round(time.perf_counter() - started_at, 2)
        measure(base, "gpu.extract_compiled", compile_s=compile_s)
    if job.base:
        measure_extraction(job)


def _measure(
    job: Job,
    base: Base,
    name: str,
    *,
    unit_tokens: int,
    batch_tokens: int,
    mean_tokens: int,
    max_tokens: int,
    seconds: float,
    rounds: int,
    **details: Any,  # noqa: ANN401 -- plain JSON values
) -> None:
    width = base.identity.width
    states = make_states(
        name,
        num_samples=max(8, _MOST_UNITS * unit_tokens // mean_tokens),
        width=1,
        num_taps=1,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        seed=width,
    )
    with fast_folder(job, states.num_tokens * width * 2) as folder:
        planned = folder / "planned"
        manifest = _plan(planned, states, width=width, unit_tokens=unit_tokens)
        inputs = UnitInputs(planned, manifest)
        bare = partial(run_bare, base, batch_tokens=batch_tokens)
        bare(inputs.read(0))  # sets up memory and kernels
        unit_s = _seconds(lambda: bare(inputs.read(0)))
        count = min(manifest.num_units, max(_FEWEST_UNITS, round(seconds / unit_s)))
        units = [inputs.read(unit) for unit in range(count)]
        tokens = sum(unit.num_tokens for unit in units)
        reports: list[ExtractReport] = []

        def extract() -> None:
            root = folder / "store"
            shutil.copytree(planned, root)
            started_at = time.perf_counter()
            report = run_units(
                root,
                manifest,
                base,
                batch_tokens=batch_tokens,
                max_disk_bytes=None,
                units=range(count),
            )
            taken["extract"].append(time.perf_counter() - started_at)
            reports.append(report)
            shutil.rmtree(root)

        def run_alone() -> None:
            taken["bare"].append(_seconds(lambda: [bare(unit) for unit in units]))

        taken: dict[str, list[float]] = {"bare": [], "extract": []}
        for number in range(rounds):
            ways = (run_alone, extract) if number % 2 == 0 else (extract, run_alone)
            for way in ways:
                way()
    bare_s, extract_s = (statistics.median(taken[each]) for each in ("bare", "extract"))
    stages = reports[-1].stage_s
    job.report(
        f"{name}.{width}",
        bare_s / extract_s,
        "x bare forward",
        at_least=TARGET,
        tokens_per_second=tokens / extract_s,
        bare_tokens_per_second=tokens / bare_s,
        raw_gb_per_second=tokens * width * 2 / extract_s / 1e9,
        seconds=taken,
        tokens=tokens,
        units=count,
        unit_tokens=unit_tokens,
        batch_tokens=batch_tokens,
        limit=reports[-1].limit,
        stage_s=stages,
        without_tail=bare_s / sum(stages.values()),
        parameters=sum(each.numel() for each in base.model.parameters()),
        flash_attention=_uses_flash(base),
        folder=str(folder.parent),
        device=_name_of(base.device),
        torch=torch.__version__,
        **details,
    )


def _plan(root: Path, states: StateSet, *, width: int, unit_tokens: int) -> Manifest:
    """Write the plan of a store of some samples, with a probe of made-up states."""
    bits = np.full((4, width), 0x3F80, dtype=np.uint16)  # ones
    settings = StoreSettings(taps=["final"], unit_tokens=unit_tokens)
    return plan_scratch(root, states.samples(), settings=settings, first_states={"final": bits})[0]


def _compile(base: Base, *, batch_tokens: int, max_tokens: int) -> None:
    """Compile the blocks of a base for any number of tokens and rows; for one row it is another."""
    blocks: Any = base.architecture.blocks
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
    some = max(2, batch_tokens // max_tokens)
    for rows, length in ((some, max_tokens), (some + 1, max_tokens // 2 + 3), (1, max_tokens)):
        ids = torch.ones(rows, length, dtype=torch.int64, device=base.device)
        with torch.inference_mode(), attention_of_any_shape():
            base.architecture.decoder(input_ids=ids, use_cache=False)
    synchronize()


def _uses_flash(base: Base) -> bool:
    """Return whether torch's attention runs this base by its flash kernel, which it prefers."""
    ids = torch.ones(2, 64, dtype=torch.int64, device=base.device)
    try:
        with torch.inference_mode(), sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            base.architecture.decoder(input_ids=ids, use_cache=False)
    except RuntimeError:
        return False
    return True


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _seconds(work: Callable[[], object]) -> float:
    synchronize()
    started_at = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started_at
