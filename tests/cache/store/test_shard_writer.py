"""Inputs that writing a unit refuses, before it writes a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_stores import (
    SETTINGS,
    UNIT_TOKENS,
    WIDTH,
    Given,
    files_below,
    make_given,
    plan_given,
    small_pieces,
    write_units,
)

from carryon.cache.errors import InputError
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import (
    UnitInput,
    UnitInputs,
    write_unit,
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    root: Path
    manifest: Manifest
    given: Given

    def input_of(self, unit: int) -> UnitInput:
        return UnitInputs(self.root, self.manifest).read(unit)

    def hidden_of(self, unit: int) -> dict[str, NDArray[Any]]:
        rows = slice(unit * UNIT_TOKENS, (unit + 1) * UNIT_TOKENS)
        return {tap: self.given.hidden[tap][rows].copy() for tap in self.manifest.taps}

    def assert_refused(self, hidden: dict[str, NDArray[Any]], match: str) -> None:
        before = files_below(self.root)
        with pytest.raises(InputError, match=match):
            write_unit(self.root, self.manifest, self.input_of(1), hidden, elapsed_s=0.0)
        assert files_below(self.root) == before


def plan(root: Path, **settings: object) -> Planned:
    given = make_given(settings=StoreSettings.from_dict(SETTINGS.to_dict() | settings))
    with small_pieces():
        manifest = plan_given(root, given)
    return Planned(root=root, manifest=manifest, given=given)


@pytest.fixture
def planned(store_tmp: Path) -> Planned:
    return plan(store_tmp / "store")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("settings", [{}, {"dtype": "float16"}, {"profile": "near"}], ids=str)
def test_a_state_that_is_not_finite_is_refused_with_sample_and_position(
    store_tmp: Path, value: float, settings: dict[str, str]
) -> None:
    planned = plan(store_tmp / "store", **settings)
    hidden, unit_input = planned.hidden_of(1), planned.input_of(1)
    row = int(unit_input.starts[-1]) + 1
    hidden["layer.1"][row, 5] = value
    index = int(np.searchsorted(planned.given.plan.unit, 2)) - 1  # the last sample of unit 1
    name = planned.given.samples[int(planned.given.plan.order[index])].id
    planned.assert_refused(
        hidden, f"unit 1, tap layer.1: a state is not finite .* in sample '{name}' at token 1: noth"
    )


@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0x7FFF, 0xFF80, 0xFFC0, 0xFFFF])
def test_not_finite_bits_of_bfloat16_are_refused_too(planned: Planned, bits: int) -> None:
    hidden = {tap: bfloat16_bits(states) for tap, states in planned.hidden_of(1).items()}
    hidden["final"][0, 0] = bits
    planned.assert_refused(
        hidden, "tap final: a state is not finite as bfloat16, in sample .* at token 0"
    )


def test_every_bit_pattern_of_nan_and_infinity_is_refused(planned: Planned) -> None:
    # Rounding all ones to bfloat16 carries out of the word: it would be stored as 0.
    for bits in (0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001):
        hidden = planned.hidden_of(1)
        hidden["final"][0, 0] = np.array([bits], dtype=np.uint32).view(np.float32)[0]
        planned.assert_refused(hidden, "tap final: a state is not finite")


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 70000.0), ("bfloat16", 3.4e38)], ids=["float16", "bfloat16"]
)
def test_a_state_too_large_for_its_stored_type_is_refused(
    store_tmp: Path, dtype: str, value: float
) -> None:
    planned = plan(store_tmp / "store", dtype=dtype)
    hidden = planned.hidden_of(1)
    hidden["final"][3, 3] = value
    planned.assert_refused(hidden, f"tap final: a state is not finite as {dtype}, in sample")


def test_states_of_other_taps_are_refused(planned: Planned) -> None:
    hidden = planned.hidden_of(1)
    planned.assert_refused(
        {"final": hidden["final"]}, r"expected states at \['final', 'layer.1'\], got"
    )
    planned.assert_refused(
        {"layer.1": hidden["layer.1"], "final": hidden["final"]}, r"got \['layer.1', 'final'\]"
    )


@pytest.mark.parametrize(
    "shape", [(UNIT_TOKENS - 1, WIDTH), (UNIT_TOKENS + 1, WIDTH), (UNIT_TOKENS, WIDTH - 1)]
)
def test_states_without_one_row_per_row_of_the_unit_are_refused(
    planned: Planned, shape: tuple[int, int]
) -> None:
    hidden = planned.hidden_of(1)
    hidden["layer.1"] = np.zeros(shape, np.float32)
    text = rf"tap layer.1: expected \(64, 16\) states, .* got \({shape[0]}, {shape[1]}\)"
    planned.assert_refused(hidden, text)


def test_states_in_rows_of_no_sample_are_refused(planned: Planned) -> None:
    num_tokens = planned.input_of(1).num_tokens
    assert num_tokens < UNIT_TOKENS
    hidden = planned.hidden_of(1)
    hidden["final"][num_tokens, 0] = 1.0
    planned.assert_refused(
        hidden, f"tap final: expected 0 in the rows after the last .*{num_tokens} tok"
    )


def test_a_unit_can_be_written_twice(planned: Planned) -> None:
    units = range(planned.manifest.num_units)
    write_units(planned.root, planned.manifest, planned.given, units)
    before = files_below(planned.root)
    write_units(planned.root, planned.manifest, planned.given, [2, 0])
    assert files_below(planned.root) == before
    assert Store.open(planned.root).num_units == planned.manifest.num_units
