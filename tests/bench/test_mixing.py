"""The benchmark of mixtures runs on tiny stores; no figure of it is asserted."""

from pathlib import Path

import pytest
from support.benchmarks import measure, names_of
from support.mixed_stores import make_anchor, make_source

from carryon.cache.errors import InputError


def test_a_mixture_is_measured_against_its_parts(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path)
    aligned = make_source(tmp_path, anchor)
    stores = [str(anchor), f"other={aligned}"]

    figures = measure("mixing.train", tmp_path, given_stores=stores)

    assert names_of(figures) == ["mixing.gate_alone", "mixing.gain", "mixing.speed"]
    assert len(figures[1].details["gains"]) == 3
    with pytest.raises(InputError, match="expected the anchor's store and one that is aligned"):
        measure("mixing.train", tmp_path, given_stores=stores[:1])
