"""Write time of a unit in a small store and in a large one."""

import time
from pathlib import Path

import numpy as np

from carryon.cache.corpus.samples import Sample
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.scratch import plan_scratch, unit_states, write_scratch_unit
from carryon.tools.bench.states import StateSet, make_states

TARGET = 0.05
UNIT_TOKENS = 1024
SAMPLE_TOKENS = 256  # four samples a unit
_WIDTH = 256


def measure_write_growth(
    job: Job, *, early_unit: int = 10, late_unit: int = 1000, rounds: int = 30
) -> None:
    """Report the relative difference in write time between a late and an early unit.

    Two stores of the same plan write units in turn, so that other disk traffic affects both.
    """
    states = make_states(
        "growth",
        num_samples=UNIT_TOKENS // SAMPLE_TOKENS,
        width=_WIDTH,
        num_taps=1,
        mean_tokens=SAMPLE_TOKENS * 16,  # clipped: all of one length
        max_tokens=SAMPLE_TOKENS,
        seed=0,
    )
    stores = {
        "early": _Growing(job.work / "early", states, early_unit + rounds, early_unit),
        "late": _Growing(job.work / "late", states, late_unit + rounds, late_unit),
    }
    seconds = in_turn({name: store.write_next for name, store in stores.items()}, rounds=rounds)
    job.report(
        "write.growth",
        abs(seconds["late"] / seconds["early"] - 1),
        "relative change",
        at_most=TARGET,
        early_unit=early_unit,
        late_unit=late_unit,
        early_s=seconds["early"],
        late_s=seconds["late"],
        unit_mb=states.raw_bytes / 1e6,
        units_timed=rounds,
    )


class _Growing:
    """A store to which one unit's states are written repeatedly."""

    def __init__(self, root: Path, states: StateSet, num_units: int, num_written: int) -> None:
        self._root = root
        samples = states.samples()
        many = [
            Sample(
                id=f"{number}-{sample.id}",
                tokens=sample.tokens,
                loss_mask=sample.loss_mask,
                char_end=sample.char_end,
                is_held_out=False,
            )
            for number in range(num_units)
            for sample in samples
        ]
        first = {tap: rows[:SAMPLE_TOKENS] for tap, rows in states.hidden.items()}
        settings = StoreSettings(taps=states.taps, unit_tokens=UNIT_TOKENS)
        self._manifest, _ = plan_scratch(root, many, settings=settings, first_states=first)
        self._inputs = UnitInputs(root, self._manifest)
        one = UnitPlan(
            order=np.arange(len(samples)),
            unit=np.zeros(len(samples), dtype=np.int64),
            start=states.starts,
            num_units=1,
        )
        self._hidden = unit_states(states, one, 0, unit_tokens=UNIT_TOKENS)
        self._next = 0
        for _ in range(num_written):
            self.write_next()

    def write_next(self) -> float:
        """Write the next unit and return the seconds it took."""
        started_at = time.perf_counter()
        write_scratch_unit(self._root, self._manifest, self._inputs, self._next, self._hidden)
        self._next += 1
        return time.perf_counter() - started_at
