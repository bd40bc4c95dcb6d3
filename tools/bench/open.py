"""Time and memory to open a very large store."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from carryon.cache.corpus.samples import Sample
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.job import Job, median_of, run_fresh
from carryon.tools.bench.scratch import plan_scratch, write_scratch_unit

SECONDS_TARGET = 1.0
MB_TARGET = 300.0
_WIDTH = 16
_SAMPLE_TOKENS = 4
_WRITERS = 8  # each waits for the disk most of the time

_OPEN = """
import json, sys, time
import psutil
from carryon.cache.store.reader import Store
# Not ru_maxrss: a child inherits the peak of its parent, which made the store.
resident = psutil.Process().memory_info
before = resident().rss
started_at = time.perf_counter()
store = Store.open(sys.argv[1])
opened_s = time.perf_counter() - started_at
opened = resident().rss
started_at = time.perf_counter()
rows = store.read_sample(store.num_samples - 1)
read_s = time.perf_counter() - started_at
after = resident().rss
print(json.dumps({
    "units": store.num_units,
    "samples": store.num_samples,
    "open_s": opened_s,
    "open_mb": (opened - before) / 1e6,
    "first_sample_s": read_s,
    "mb_with_tables": (after - before) / 1e6,
}))
"""


def measure_opening(
    job: Job, *, units: int = 4000, samples: int = 2_000_000, rounds: int = 3
) -> None:
    """Write a store of many small samples and open it in fresh processes.

    Its states are narrow: the cost of opening depends on the number of units and samples only.
    """
    root = job.work / "large"
    make_large_store(root, num_units=units, num_samples=samples)
    median = median_of([run_fresh(_OPEN, str(root)) for _ in range(rounds)])
    for figure, value, unit, target in (
        ("open.seconds", median["open_s"], "s", SECONDS_TARGET),
        ("open.memory", median["open_mb"], "MB", MB_TARGET),
    ):
        job.report(figure, value, unit, at_most=target, **median)


def make_large_store(root: Path, *, num_units: int, num_samples: int) -> Manifest:
    """Write a store of many tiny samples, all units with equal states. Minutes for millions."""
    unit_tokens = -(-num_samples // num_units) * _SAMPLE_TOKENS
    tokens = np.arange(_SAMPLE_TOKENS, dtype=np.int32)
    loss_mask = np.ones(_SAMPLE_TOKENS, dtype=np.uint8)
    loss_mask[0] = 0
    samples = [
        Sample(
            id=f"sample-{index}",
            tokens=tokens,
            loss_mask=loss_mask,
            char_end=tokens,
            is_held_out=False,
        )
        for index in range(num_samples)
    ]
    random = np.random.default_rng(0)
    states = bfloat16_bits(random.standard_normal((unit_tokens, _WIDTH), dtype=np.float32))
    settings = StoreSettings(unit_tokens=unit_tokens)
    manifest, plan = plan_scratch(root, samples, settings=settings, first_states={"final": states})
    inputs = UnitInputs(root, manifest)
    with ThreadPoolExecutor(_WRITERS) as pool:
        writes = [
            pool.submit(write_scratch_unit, root, manifest, inputs, unit, {"final": states})
            for unit in range(plan.num_units)
        ]
        for write in writes:
            write.result()
    return manifest
