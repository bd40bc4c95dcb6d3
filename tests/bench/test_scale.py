"""Benchmarks of many units: a sparse store that streams, and units that sleep in a real Ray."""

from pathlib import Path

import pytest
from support.benchmarks import measure, names_of

from carryon.cache.store.reader import Store
from carryon.tools.bench.scale import make_sparse_store
from carryon.train.data.store_dataset import StoreDataset


def test_a_sparse_store_opens_and_its_first_windows_stream(tmp_path: Path) -> None:
    make_sparse_store(tmp_path / "store", num_units=300)
    store = Store.open(tmp_path / "store")
    assert (store.num_units, store.num_samples) == (300, 600)
    batches = iter(StoreDataset(tmp_path / "store"))
    tokens = [next(batches)["input_ids"].tolist() for _ in range(3)]
    assert tokens == [[0, 1, 2, 3, 4, 5, 6, 7] * 4] * 3, "two units of two samples each"


@pytest.mark.slow
def test_units_that_sleep_in_ray_give_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    [figure] = measure("store.ray_overhead", tmp_path, sizes={"units": 8})
    assert names_of([figure]) == ["ray.overhead"]
    assert figure.details["units"] == 8
