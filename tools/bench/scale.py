"""A store of very many units: seconds until it is open, and until the first batch is there.

Written are the tables of the samples, a name for each receipt, and whole the units that the first
windows read: opening and streaming look at nothing else. A whole store of a million units would
take hours to write.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.files.atomic import write_file
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, receipt_path, row_path
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.job import Job, median_of, run_fresh
from carryon.tools.bench.scratch import plan_scratch, write_scratch_unit
from carryon.train.data.store_dataset import StoreDataset

OPEN_TARGET_S, BATCH_TARGET_S = 2.0, 3.0
_WIDTH, _SAMPLE_TOKENS, _SAMPLES_PER_UNIT = 16, 8, 2
_UNIT_TOKENS = _SAMPLE_TOKENS * _SAMPLES_PER_UNIT
_WINDOWS = 64
"""Windows of which all units are written: more than are read before the first batch."""
_MEASURE = """
import json, sys, time
import psutil
from carryon.cache.store.reader import Store
from carryon.train import StoreDataset
resident = psutil.Process().memory_info
before = resident().rss
started_at, cpu_at = time.perf_counter(), time.process_time()
store = Store.open(sys.argv[1])
open_s, open_cpu_s = time.perf_counter() - started_at, time.process_time() - cpu_at
units, samples = store.num_units, store.num_samples
del store
started_at, cpu_at = time.perf_counter(), time.process_time()
batch = next(iter(StoreDataset(sys.argv[1], batch_tokens=4096)))
first_batch_s = time.perf_counter() - started_at
first_batch_cpu_s = time.process_time() - cpu_at
print(json.dumps({
    "units": units,
    "samples": samples,
    "open_s": open_s,
    "open_cpu_s": open_cpu_s,
    "first_batch_s": first_batch_s,
    "first_batch_cpu_s": first_batch_cpu_s,
    "batch_tokens": len(batch["input_ids"]),
    "mb": (resident().rss - before) / 1e6,
}))
"""
_PLAN = """
import json, sys, time
from carryon.train import StoreDataset
dataset = StoreDataset(sys.argv[1], batch_tokens=4096)
cpu_at = time.process_time()
len(dataset)
print(json.dumps({"plan_cpu_s": time.process_time() - cpu_at}))
"""


def measure_scale(job: Job, *, units: int = 1_000_000, rounds: int = 3) -> None:
    """Report seconds to open a store of many units, and to the first batch of a StoreDataset.

    The second counts everything from a closed store on: opening, the order of the units, reading.
    In fresh processes, the files in the cache of the system; processor seconds are beside them.
    Those of the plan of a whole epoch, which training makes before it begins, are measured once.

    Args:
        job: input.
        units: of the store.
        rounds: medians count.
    """
    root = job.work / "store"
    make_sparse_store(root, num_units=units)
    median = median_of([run_fresh(_MEASURE, str(root)) for _ in range(rounds)])
    job.report("scale.open", median["open_s"], "s", at_most=OPEN_TARGET_S, **median)
    job.report("scale.first_batch", median["first_batch_s"], "s", at_most=BATCH_TARGET_S, **median)
    plan_cpu_s = run_fresh(_PLAN, str(root))["plan_cpu_s"]
    job.report("scale.plan", plan_cpu_s, "s of processor time", units=units)


def make_sparse_store(root: Path, *, num_units: int) -> None:
    """Write a store that opens and streams, with few of its units."""
    random = np.random.default_rng(0)
    states = bfloat16_bits(random.standard_normal((_UNIT_TOKENS, _WIDTH), dtype=np.float32))
    settings = StoreSettings(unit_tokens=_UNIT_TOKENS)
    manifest, plan = plan_scratch(
        root,
        SampleTable.of(_samples(num_units * _SAMPLES_PER_UNIT)),
        settings=settings,
        first_states={"final": states},
        has_rows=False,
    )
    assert plan.num_units == num_units
    for unit in range(num_units):
        os.close(os.open(root / receipt_path(unit), os.O_WRONLY | os.O_CREAT))
    _write_units(root, manifest, [0], states)  # the probe lies there
    windows = islice(StoreDataset(root)._iter_plan(), _WINDOWS)
    first = {unit for window in windows for unit in window.units}
    _write_units(root, manifest, sorted(first), states)


def _write_units(root: Path, manifest: Manifest, units: Sequence[int], states: np.ndarray) -> None:
    sample = next(_samples(1))
    for unit in units:
        for name, dtype in ROW_ARRAYS.items():
            rows = np.tile(getattr(sample, name), _SAMPLES_PER_UNIT).astype(dtype)
            write_file(root / row_path(name, unit), encode_chunk(rows), root=root)
    inputs = UnitInputs(root, manifest)
    for unit in units:
        write_scratch_unit(root, manifest, inputs, unit, {"final": states})


def _samples(num: int) -> Iterator[Sample]:
    """Yield samples that differ in their ids only."""
    tokens = np.arange(_SAMPLE_TOKENS, dtype=np.int32)
    loss_mask = np.ones(_SAMPLE_TOKENS, dtype=np.uint8)
    loss_mask[0] = 0
    for index in range(num):
        yield Sample(
            id=f"sample-{index}",
            tokens=tokens,
            loss_mask=loss_mask,
            char_end=tokens,
            is_held_out=False,
        )
