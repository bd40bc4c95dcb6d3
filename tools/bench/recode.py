"""A copy of an exact store in a lossy profile, made without its base.

The copy holds the same samples in the same rows.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from carryon.cache.corpus.samples import SampleTable
from carryon.cache.extraction.layout_writer import plan_files, write_plan
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.format.probe import read_probe
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import UnitInputs, write_unit
from carryon.tools.bench.scratch import profile_error
from carryon.tools.bench.states import require_exact, samples_of


def recode_store(store: Store, root: Path, *, profile: str) -> Store:
    """Write the copy to `root` and open it.

    Raises:
        InputError: the store does not hold exact bfloat16 states.
    """
    require_exact(store)
    # The first tokens of the first unit, as in an extraction's pilot.
    first = store.read_unit(min(store.finished_units)).hidden
    manifest = replace(
        store.manifest,
        settings=store.manifest.settings | {"profile": profile, "with_blocks": 0},
        profile_error=profile_error({tap: bits[1:512] for tap, bits in first.items()}, profile),
        files={},
    )
    samples = SampleTable.of(samples_of(store))
    unit_tokens = manifest.unit_tokens
    plan = UnitPlan(
        order=np.arange(store.num_samples),
        unit=store.sample_starts // unit_tokens,
        start=store.sample_starts,
        num_units=store.num_units,
    )
    probe = read_probe(store.root, store.manifest)
    files = plan_files(manifest, samples, plan, head=store.head(), probe=probe)
    manifest = write_plan(root, manifest, files)
    inputs = UnitInputs(root, manifest)
    for unit in store.iter_units():
        write_unit(root, manifest, inputs.read(unit.unit), unit.hidden, elapsed_s=0.0)
    return Store.open(root)
