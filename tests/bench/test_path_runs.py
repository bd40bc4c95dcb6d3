"""Paradigms compared, with what they share trained once."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import TINY
from support.tiny_train_stores import make_tiny_store

from carryon.cache import extract
from carryon.cache.errors import InputError
from carryon.tools.bench import path_runs
from carryon.tools.bench.path_plan import (
    Lengths,
    Plan,
    plan_paradigms,
    steps_by_formula,
)
from carryon.tools.bench.path_runs import PathRuns, mean_weights
from carryon.train.config import CarryOnSettings, OptimizationSettings, TrainSettings
from carryon.train.optim.lr_paths import PARADIGMS
from carryon.train.trainer.held_out.job import EvalJob

SETTINGS = TINY.with_options(epochs=1, tokens_per_step=20, min_lr_ratio=0.1, dropout=0.2)
OPTIMIZATION = OptimizationSettings(
    epochs=1, learning_rate=3e-3, min_lr_ratio=0.1, warmup_ratio=0.0
)
LENGTHS = {0: Lengths(alone=(10, 10, 10, 10), so_far=(10, 20, 30, 40))}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("stores")
    return [str(make_tiny_store(root / f"{seed}", samples_seed=seed)) for seed in (1, 2)]


def _plan(experiment: PathRuns, *schedules: str) -> Plan:
    return plan_paradigms(
        {0: experiment.lengths(0)},
        kinds=PARADIGMS,
        schedules=schedules,
        alphas=[0.6],
        settings=experiment.settings.optimization,
    )


def _run(root: Path, stores: list[str], *schedules: str) -> PathRuns:
    experiment = PathRuns(root=root, stores=stores, settings=SETTINGS)
    experiment.begin()
    experiment.run(_plan(experiment, *schedules))
    return experiment


@pytest.fixture(scope="module")
def done(stores: list[str], tmp_path_factory: pytest.TempPathFactory) -> PathRuns:
    return _run(tmp_path_factory.mktemp("done"), stores, "cosine", "multistep")


def _results(experiment: PathRuns) -> dict[str, Any]:
    paths = (experiment.root / "results").glob("*.json")
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: row | {"train_s": 0.0} for name, row in found.items()}


@pytest.mark.parametrize("schedule", ["cosine", "knee", "multistep"])
def test_the_counted_cost_is_that_of_the_formulas(schedule: str) -> None:
    plan = plan_paradigms(
        LENGTHS, kinds=PARADIGMS, schedules=[schedule], alphas=[0.6], settings=OPTIMIZATION
    )

    for kind in PARADIGMS:
        mine = [version for version in plan.versions if version.kind == kind]
        steps = sum(stop - first for version in mine for _, first, stop in version.paid)
        assert len(mine) == 4
        assert steps == steps_by_formula(kind, versions=4, steps=10, alpha=0.6), kind


def test_four_versions_cost_58_and_40_percent_of_those_from_scratch() -> None:
    steps = {kind: steps_by_formula(kind, versions=4, steps=100, alpha=0.6) for kind in PARADIGMS}

    assert steps.pop("switch") / steps["scratch"] == Fraction(58, 100)
    scratch = steps.pop("scratch")
    assert {count / scratch for count in steps.values()} == {Fraction(40, 100)}


def test_the_trunk_and_first_versions_are_trained_once() -> None:
    plan = plan_paradigms(
        LENGTHS,
        kinds=PARADIGMS,
        schedules=["cosine", "multistep"],
        alphas=[0.6],
        settings=OPTIMIZATION,
    )
    steps = {
        name: segment.steps.stop - segment.steps.first for name, segment in plan.segments.items()
    }

    assert sum(count for name, count in steps.items() if "trunk" in name) == 40
    assert sum(count for name, count in steps.items() if name.startswith("s0/cosine")) == (
        100 + 30 + 30 + 4 * 6 + 30
    )
    assert steps["s0/multistep/a0.6/branch-3"] < steps["s0/cosine/a0.6/branch-3"] == 6
    assert steps["s0/multistep/scratch-1"] < steps["s0/cosine/scratch-1"] == 10


def test_a_mean_is_of_evenly_spaced_states_up_to_the_end() -> None:
    lengths = {0: Lengths(alone=(40,), so_far=(40,))}
    plan = plan_paradigms(
        lengths, kinds=["wsm"], schedules=["knee"], alphas=[0.6], settings=OPTIMIZATION
    )

    assert [step for _, step in plan.versions[0].states] == [20, 24, 28, 32, 36, 40]


def test_a_stopped_experiment_resumes_to_the_same_results(
    done: PathRuns, stores: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def stop_at_the_third(*args: Any, **options: Any) -> None:  # noqa: ANN401 -- as train_segments
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(*args, **options)

    real = path_runs.train_segments
    with monkeypatch.context() as patch:
        patch.setattr(path_runs, "train_segments", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path, stores, "cosine")
    one = _run(tmp_path, stores, "cosine")
    assert len(_results(one)) < len(_results(done))
    both = _run(tmp_path, stores, "cosine", "multistep")

    assert _results(both) == _results(done)


def test_a_branch_that_starts_on_the_trunk_ends_with_the_same_weights(
    done: PathRuns, stores: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carryon.tools.bench.path_plan._WORTH", 2.0)
    alone = _run(tmp_path, stores, "multistep")

    found, expected = _results(alone), _results(done)
    assert all(found[name] == expected[name] for name in found)


def test_only_the_trunk_is_kept(done: PathRuns) -> None:
    folders = {
        path.parent.relative_to(done.root / "runs").as_posix()
        for path in (done.root / "runs").rglob("run.json")
    }

    assert folders == {"s0/trunk-1", "s0/trunk-2"}


def test_a_mean_of_states_is_their_mean(done: PathRuns) -> None:
    steps = sorted(done.folder("s0/trunk-1").checkpoints.glob("step-*"))[:3]

    found = mean_weights(steps)

    for name, weight in found.items():
        each = torch.stack(
            [load_file(step / "carryon.safetensors")[name].double() for step in steps]
        )
        torch.testing.assert_close(weight.double(), each.mean(0), rtol=1e-5, atol=1e-6)


def test_a_result_keeps_its_held_out_targets_beside_those_of_training(done: PathRuns) -> None:
    """The training count once overwrote them."""
    stores = [done.data((index,)) for index in range(2)]
    held_out = [
        sum(int((data.store.read_sample(i).loss_mask[1:] == 1).sum()) for i in data.split.held_out)
        for data in stores
    ]

    for name, row in _results(done).items():
        assert row["held_out_targets"] == held_out[: row["version"]], name
        assert isinstance(row["targets"], int)
        assert row["targets"] > sum(held_out)


def test_a_top_is_trained_and_measured_on_the_tap_below_its_blocks(
    tiny_base_folder: Path, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller leaves to the kind."""
    stores = [str(store_tmp / f"store-{number}") for number in range(2)]
    for number, store in enumerate(stores):
        extract(
            base=tiny_base_folder,
            data=[{"text": f"{number} {index} is the thing " * 4} for index in range(12)],
            out=store,
            taps=["final", "layer.1"],
            unit_tokens=64,
            with_blocks=1,
        )
    measured: list[list[str]] = []

    def note(store: Any, samples: Any, jobs: Sequence[EvalJob], **options: Any) -> Any:  # noqa: ANN401
        measured.extend(job.carryon.settings.taps for job in jobs)
        return real(store, samples, jobs, **options)

    real = path_runs.measure_nlls
    monkeypatch.setattr(path_runs, "measure_nlls", note)
    settings = TrainSettings(
        carryon=CarryOnSettings(kind="top", blocks=1),
        optimization=OptimizationSettings(epochs=1, tokens_per_step=20, min_lr_ratio=0.1),
    ).resolved()
    experiment = PathRuns(root=store_tmp / "out", stores=stores, settings=settings)
    experiment.begin()
    experiment.run(_plan(experiment, "cosine"))

    assert measured
    assert {tuple(taps) for taps in measured} == {("layer.1",)}
    configs = list(experiment.root.glob("runs/s0/trunk-*/config.yaml"))
    assert configs
    assert all("- layer.1" in config.read_text() for config in configs)


def test_other_settings_are_refused(done: PathRuns, stores: list[str]) -> None:
    other = PathRuns(
        root=done.root, stores=stores, settings=SETTINGS.with_options(learning_rate=0.5)
    )

    with pytest.raises(InputError, match="learning_rate is 0.02 there and 0.5 here"):
        other.begin()
