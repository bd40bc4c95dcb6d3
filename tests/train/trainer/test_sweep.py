"""Side by side as alone, to the bit, from one read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import TINY, assert_same_bits, metrics_without_times, train_tiny, without
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError, MissingError, UnsafePathError
from carryon.cache.store.reader import Store
from carryon.train.trainer import finish
from carryon.train.trainer import run as run_module
from carryon.train.trainer import sweep as sweep_module
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.step import take_step
from carryon.train.trainer.sweep import grid, read_runs, sweep

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"learning_rate": 0.1},
    "wide": {"width": 16, "blocks": 2},
    "seed": {"seed": 3},
    "long": {"epochs": 3, "tokens_per_step": 25},
    "small": {"micro_batch_tokens": 13, "dropout": 0.3},
    "middle": {"taps": ["final", "layer.1"]},
    "filtered": {"gradient_filter": 1e-2, "head_dtype": "float32"},
    "sampled": {"sampled_softmax": 1},
    "early": {"patience": 1, "evaluate_every": 2, "learning_rate": 3.0},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep") / "store"
    return make_tiny_store(root, taps=("final", "layer.1"))


@pytest.fixture(autouse=True, scope="module")
def without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        patch.setattr(sweep_module, "plot_runs", lambda metrics, path: False)
        yield


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    out = tmp_path_factory.mktemp("finished") / "sweep"
    return out, _sweep(store, out)


def _sweep(store: Path, out: Path, runs: Mapping[str, dict[str, Any]] = RUNS) -> list[TrainReport]:
    return sweep(store, out=out, settings=TINY, runs=runs)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_sweep_is_to_the_bit_what_it_is_alone(
    store: Path, finished: tuple[Path, list[TrainReport]], tmp_path: Path, name: str
) -> None:
    out, reports = finished

    alone = train_tiny(store, tmp_path / name, **RUNS[name])

    report = reports[list(RUNS).index(name)]
    assert without(report, out="") == without(alone, out="")
    assert_same_bits(out / name, tmp_path / name)
    assert metrics_without_times(out / name) == metrics_without_times(tmp_path / name)


def test_a_run_that_no_longer_gets_better_ends_early_beside_the_others(
    finished: tuple[Path, list[TrainReport]],
) -> None:
    steps = {name: report.num_steps for name, report in zip(RUNS, finished[1], strict=True)}

    assert steps["early"] < steps["plain"] < steps["long"]


def test_a_sweep_reads_as_much_as_one_run(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[tuple[int, str]] = []
    copy_states = Store.copy_states

    def counted(self: Store, unit: int, tap: str, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        rows.append((unit, tap))
        copy_states(self, unit, tap, *args, **kwargs)

    monkeypatch.setattr(Store, "copy_states", counted)
    _sweep(store, tmp_path / "one", {"one": {}})
    of_one, rows = rows, []
    _sweep(store, tmp_path / "four", {f"{rate}": {"learning_rate": rate} for rate in (1, 2, 3, 4)})

    assert sorted(rows) == sorted(of_one)
    assert len(of_one) > 4


@pytest.mark.parametrize("call", [5, 31, 60, 90])
def test_a_killed_sweep_resumes_to_the_same_bits(
    store: Path,
    finished: tuple[Path, list[TrainReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    calls = iter(range(1000))

    def killed_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == call:
            raise SystemError("killed")
        return take_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "take_step", killed_step)
        with pytest.raises(SystemError, match="killed"):
            _sweep(store, tmp_path / "sweep")

    _sweep(store, tmp_path / "sweep")

    for name in RUNS:
        assert_same_bits(tmp_path / "sweep" / name, finished[0] / name)
        actual, expected = (
            metrics_without_times(root / name) for root in (tmp_path / "sweep", finished[0])
        )
        assert actual == expected


def test_the_summary_has_every_run_and_what_it_changed(
    finished: tuple[Path, list[TrainReport]],
) -> None:
    out, reports = finished

    rows = json.loads((out / "sweep.json").read_text())["runs"]

    assert {row["run"]: row["changes"] for row in rows} == RUNS
    assert [row["carryon_nll"] for row in rows] == [report.carryon_nll for report in reports]


def test_what_decides_the_reading_must_be_the_same(store: Path, tmp_path: Path) -> None:
    runs = {"few": {"window_units": 1}, "many": {"window_units": 3}}

    with pytest.raises(InputError, match="window_units: expected one value .* got 1 and in many 3"):
        _sweep(store, tmp_path / "sweep", runs)

    assert not (tmp_path / "sweep").exists()


def test_a_setting_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no setting colour"):
        TINY.with_options(colour=1)


def test_a_grid_has_every_combination() -> None:
    runs = grid(["learning_rate=1e-3,3e-3", "taps=final,final+layer.1"])

    assert runs == {
        "learning_rate=0.001,taps=final": {"learning_rate": 1e-3, "taps": ["final"]},
        "learning_rate=0.001,taps=final+layer.1": {
            "learning_rate": 1e-3,
            "taps": ["final", "layer.1"],
        },
        "learning_rate=0.003,taps=final": {"learning_rate": 3e-3, "taps": ["final"]},
        "learning_rate=0.003,taps=final+layer.1": {
            "learning_rate": 3e-3,
            "taps": ["final", "layer.1"],
        },
    }


@pytest.mark.parametrize(
    ("vary", "text"),
    [
        ("width", "expected NAME=VALUE,VALUE, got 'width'"),
        ("width=wide", "width: expected a whole number, got 'wide'"),
        ("gate=open", "gate: expected channel, token or none, got 'open'"),
        ("colour=red", "no setting colour"),
        ("lr=1e-3", r"no setting lr: did you mean learning_rate\?"),
    ],
)
def test_a_wrong_axis_is_refused(vary: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        grid([vary])


def test_runs_of_one_name_or_of_a_name_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected runs that differ, got two of the name"):
        grid(["learning_rate=0.0012345671,0.0012345672"])
    taps = "+".join(f"layer.{at}" for at in range(40))
    with pytest.raises(InputError, match="expected a name of at most 200 bytes"):
        grid([f"taps={taps}"])
    path = tmp_path / "runs.yaml"
    path.write_text(f"- name: {'x' * 300}\n  width: 64\n")
    with pytest.raises(InputError, match="expected a name of at most 200 bytes, got 300"):
        read_runs(path)
    with pytest.raises(InputError, match="got what cannot be read: Is a directory"):
        read_runs(tmp_path)


def test_runs_can_be_listed_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.yaml"
    path.write_text("- name: slow\n  learning-rate: 1e-4\n- width: 64\n  recompute: yes\n")

    assert read_runs(str(path)) == {
        "slow": {"learning_rate": 1e-4},
        "width=64,recompute=True": {"width": 64, "recompute": True},
    }


def test_a_file_of_runs_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"none.yaml: expected a YAML list of runs"):
        read_runs(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["[" * 100_000, "- a: 1: 2", "[[1]]", "x" * (1 << 21)])
def test_a_file_of_something_else_than_runs_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"{path}: expected .*") as caught:
        read_runs(path)
    assert "\n" not in str(caught.value)


def test_a_run_of_a_sweep_that_is_a_link_is_refused(store: Path, tmp_path: Path) -> None:
    for name in ("outside", "sweep"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweep/seed=1").symlink_to("../outside")
    with pytest.raises(UnsafePathError, match="expected a folder, got a link"):
        sweep(store, out=tmp_path / "sweep", vary={"seed": [1, 2]}, settings=TINY)
    assert not list((tmp_path / "outside").iterdir())
