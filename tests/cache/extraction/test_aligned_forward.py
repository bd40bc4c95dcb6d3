"""Large trees go through the base in parts: the same states, and bounded masks."""

import numpy as np
import pytest
from support.aligned_stores import FORWARD, make_base

from carryon.cache.alignment.tree import depths, split_tree
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import DamagedStoreError
from carryon.cache.extraction import aligned_forward
from carryon.cache.extraction.aligned_forward import compute_aligned_states
from carryon.cache.format.alignment import UnitAlignment

TAPS = ["layer.1", "final", "stable"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("base")
    return load_base(
        str(make_base(folder / "b", "gpt2", max_position_embeddings=64)), forward=FORWARD
    )


def make_tree(num_trunk: int, num_branches: int) -> np.ndarray:
    """Return the parents of a trunk with branches of two nodes."""
    parents = list(range(-1, num_trunk - 1))
    for branch in range(num_branches):
        parents += [branch % num_trunk, len(parents)]
    return np.array(parents, dtype=np.int32)


def make_unit(*trees: np.ndarray) -> tuple[UnitAlignment, np.ndarray]:
    """Return trees behind each other, a row for each node."""
    sizes = np.array([len(tree) for tree in trees], dtype=np.int32)
    firsts = np.cumsum(sizes) - sizes
    parents = np.concatenate(
        [np.where(tree < 0, -1, tree + first) for tree, first in zip(trees, firsts, strict=True)]
    ).astype(np.int32)
    nodes = np.arange(len(parents), dtype=np.int32)
    alignment = UnitAlignment(
        tokens=np.random.default_rng(0).integers(0, 300, len(parents)).astype(np.int32),
        parents=parents,
        exact=nodes,
        stable=parents,
        covered=np.zeros_like(nodes),
        is_whole=np.ones(len(nodes), dtype=np.uint8),
    )
    return alignment, sizes


@pytest.mark.parametrize("batch_tokens", [40, 400])
def test_parts_of_trees_have_the_states_of_whole_trees(
    base: Base, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    unit, sizes = make_unit(make_tree(30, 20), make_tree(1, 3), make_tree(20, 40))
    how = {"keeps_bits": False, "batch_tokens": batch_tokens}
    whole = compute_aligned_states(base, TAPS, unit, sizes, **how)
    monkeypatch.setattr(aligned_forward, "MAX_NODES", 35)
    parts = compute_aligned_states(base, TAPS, unit, sizes, **how)
    for tap in TAPS:
        np.testing.assert_allclose(parts[tap], whole[tap], atol=1e-5)
        has_node = (unit.stable if tap == "stable" else unit.exact) >= 0
        assert np.abs(parts[tap]).max(axis=1)[has_node].min() > 0


def test_a_path_longer_than_the_context_of_the_base_is_refused(
    base: Base,
) -> None:
    unit, sizes = make_unit(make_tree(65, 1))
    with pytest.raises(DamagedStoreError, match="paths of at most 64 tokens.*got 65"):
        compute_aligned_states(base, TAPS, unit, sizes, keeps_bits=False, batch_tokens=40)


@pytest.mark.parametrize("num_branches", [0, 3, 500])
def test_each_part_holds_its_paths_and_all_of_them_cost_a_few_times_the_tree(
    num_branches: int,
) -> None:
    parents = make_tree(100, num_branches)
    deepest = int(depths(parents).max()) + 1
    most = deepest + deepest // 4
    parts = split_tree(parents, max_nodes=most)
    for part in parts:
        assert len(part) <= most
        before = parents[part]
        assert set(before[before >= 0].tolist()) <= set(part.tolist())
    assert set(np.concatenate(parts).tolist()) == set(range(len(parents)))
    assert sum(map(len, parts)) <= 6 * len(parents)
