"""Errors of the loss in its figures, on synthetic states and on those of a store."""

from pathlib import Path

from support.benchmarks import measure, names_of
from support.tiny_train_stores import make_tiny_store


def test_the_filter_is_measured_on_both_inputs_within_its_bound(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")

    figures = measure(
        "train.loss", tmp_path, given_stores=[str(store)], sizes={"gradient_filter": 1e-3}
    )

    assert names_of(figures) == [
        *("loss.speed", "loss.filtered.speed", "loss.filtered.store.speed"),
    ]
    exact, *filtered = figures
    assert "gradient_filter" not in exact.details
    for figure in filtered:
        assert figure.details["left_out_most"] > 0
        assert figure.details["gradient_relative_error"] <= figure.details["bound_relative"]
        assert 0 < figure.details["error_to_bound_most"] <= 1
