"""A copy of an exact store in a lossy profile, made without its base.

The copy holds the same samples in the same rows. Letters: R rows of a unit, D width, S samples.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from carryon.cache.base.lm_head import widen
from carryon.cache.corpus.dataset import Sample
from carryon.cache.extraction.layout_writer import write_plan
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.format.probe import channel_relative_error, read_probe
from carryon.cache.format.quantization import STEPS, from_codes, to_codes
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import read_unit_input, write_unit
from carryon.tools.bench.states import require_exact


def recode_store(store: Store, root: Path, *, profile: str) -> Store:
    """Write the copy to `root` and open it.

    Raises:
        InputError: the store does not keep exact bfloat16 states.
    """
    require_exact(store)
    manifest = replace(
        store.manifest,
        settings=store.manifest.settings | {"profile": profile, "with_blocks": 0},
        profile_error=_errors(store, profile),
        files={},
    )
    samples, lengths = _samples(store), store.sample_lengths
    unit_tokens = manifest.unit_tokens
    plan = UnitPlan(
        order=np.arange(store.num_samples),
        unit=store.sample_starts // unit_tokens,
        start=store.sample_starts,
        num_units=store.num_units,
    )
    probe = read_probe(store.root, store.manifest)
    manifest = write_plan(root, manifest, samples, plan, head=store.head(), probe=probe)
    for unit in store.iter_units():
        inside = slice(unit.samples.start, unit.samples.stop)
        given = read_unit_input(
            root,
            manifest,
            unit.unit,
            starts=store.sample_starts[inside],
            lengths=lengths[inside],
        )
        write_unit(root, manifest, given, unit.hidden, elapsed_s=0.0)
    return Store.open(root)


def _samples(store: Store) -> list[Sample]:
    return [
        Sample(
            id=store.sample_id(sample),
            tokens=unit.tokens[rows],
            loss_mask=unit.loss_mask[rows],
            char_end=unit.char_end[rows],
            is_held_out=bool(store.sample_held_out[sample]),
        )
        for unit in store.iter_units(taps=[])
        for sample in unit.samples
        for rows in [unit.rows_of(sample)]
    ]


def _errors(store: Store, profile: str) -> dict[str, dict[str, float]]:
    """Return what an extraction's pilot would record, of the first unit's first tokens."""
    found = {}
    for tap, bits in store.read_unit(min(store.finished_units)).hidden.items():
        states = widen(bits[1:512])
        made = widen(from_codes(to_codes(states, step=STEPS[profile])))
        found[tap] = {"channel_relative_error": channel_relative_error(made, states)}
    return found
