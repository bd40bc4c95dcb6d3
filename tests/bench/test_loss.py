"""Errors that its figures tell, on states made up and of a store."""

from dataclasses import replace
from pathlib import Path

from support.tiny_train_stores import make_tiny_store

from carryon.tools.bench.loss import measure_loss
from carryon.tools.bench.train import TrainJob
from carryon.tools.bench.train_settings import QUICK_TRAIN, BenchTrainSettings
from carryon.tools.compare.figure import Figure


def test_the_filter_is_measured_on_both_inputs_within_its_bound(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")
    found: list[Figure] = []

    measure_loss(
        TrainJob(
            settings=BenchTrainSettings(figures=["loss"], store=str(store)),
            sizes=replace(QUICK_TRAIN, loss_filter=1e-3),
            work=tmp_path,
            report=found.append,
        )
    )

    exact, *filtered = found
    assert [figure.figure for figure in found] == [
        *("loss.speed", "loss.filtered.speed", "loss.filtered.store.speed"),
    ]
    assert "gradient_filter" not in exact.details
    for figure in filtered:
        assert figure.details["left_out_most"] > 0
        assert figure.details["gradient_relative_error"] <= figure.details["bound_relative"]
        assert 0 < figure.details["error_to_bound_most"] <= 1
