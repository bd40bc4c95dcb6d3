"""Tests of the way of the loss: timed when a run begins, recorded, and kept when it is resumed."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at, saved_weights, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache import device
from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.train.continual.lineage import release, update
from carryon.train.continual.lineage_dir import open_lineage
from carryon.train.losses import calibration
from carryon.train.trainer import choices
from carryon.train.trainer.sweep import sweep


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny store."""
    return make_tiny_store(tmp_path_factory.mktemp("ways") / "store", first_target=1)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Take the way `shifted` in the tiny heads as well; counts the measurements."""
    counted = {"measured": 0}
    calibrate = choices.calibrate

    def count(*args: object, **options: object) -> calibration.Calibration | None:
        counted["measured"] += 1
        return calibrate(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(choices, "calibrate", count)
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    monkeypatch.setattr(calibration, "choose", lambda seconds: "shifted")
    return counted


def _recorded(run: Path) -> tuple[str, str]:
    config = yaml.safe_load((run / "config.yaml").read_text())
    return config["loss_way"], read_sealed(run / "run.json")["identity"]["loss_way"]


def test_a_small_head_has_the_way_of_before(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run")
    assert _recorded(tmp_path / "run") == ("attention", "attention")


def test_what_is_chosen_is_logged_recorded_and_repeats_from_the_config(
    store: Path, tmp_path: Path, chosen: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_tiny(store, tmp_path / "run")
    assert _recorded(tmp_path / "run") == ("shifted", "shifted")
    assert caplog.text.count("loss_way shifted: times attention ") == 1
    assert "% of the gradient and" in caplog.text

    train_tiny(store, tmp_path / "again", loss_way="shifted")

    assert chosen["measured"] == 1
    assert_same_bits(tmp_path / "again", tmp_path / "run")


def test_a_way_that_cannot_multiply_the_head_is_warned_of(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tiny(store, tmp_path / "plain", head_dtype="float32", loss_way="plain")
    assert "loss_way" not in caplog.text

    train_tiny(store, tmp_path / "run", head_dtype="float32", loss_way="rounded")

    expected = "expected attention, shifted, plain for this head on cpu, got rounded: attention is"
    assert f"loss_way: {expected} taken" in caplog.text


def test_a_resumed_run_keeps_its_way(
    store: Path, tmp_path: Path, chosen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(store, tmp_path / "whole", epochs=3)
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run", epochs=3)
    monkeypatch.setattr(calibration, "choose", lambda seconds: "attention")

    train_tiny(store, tmp_path / "run", epochs=3)

    assert chosen["measured"] == 2
    assert _recorded(tmp_path / "run") == ("shifted", "shifted")
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(InputError, match="loss_way is 'shifted' there and 'plain' here"):
        train_tiny(store, tmp_path / "run", epochs=3, loss_way="plain")


@pytest.mark.parametrize("lost", ["", "config.yaml", "run.json"])
def test_a_run_from_before_resumes_with_the_way_of_before(
    store: Path, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, int]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_tiny(store, whole, loss_way="attention", epochs=3)
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, run, loss_way="attention", epochs=3)
    document = read_sealed(run / "run.json")
    del document["identity"]["loss_way"]
    write_json(run / "run.json", sealed(document))
    if lost:
        (run / lost).unlink()

    train_tiny(store, run, epochs=3)

    assert chosen["measured"] == 0
    assert_same_bits(run, whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_run_keeps_its_dtype_of_products(
    store: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that multiplies the other dtype faster."""
    train_tiny(store, tmp_path / "whole", epochs=3, head_dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(device, "multiplies_bfloat16", lambda _: dtype == "bfloat16")
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run", epochs=3)
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: dtype == "float32")

    train_tiny(store, tmp_path / "run", epochs=3)

    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["head_dtype"] == dtype
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_run_from_before_dtypes_were_kept_resumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(store, tmp_path / "whole", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(choices, "_measure_head_dtype", lambda *_: "auto")  # as they recorded it
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run", epochs=3)

    train_tiny(store, tmp_path / "run", epochs=3)

    assert read_sealed(tmp_path / "run/run.json")["identity"]["head_dtype"] == "auto"
    run, whole = (saved_weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(run[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["loss_way", "head_dtype"])
@pytest.mark.parametrize("way", ["telepathy", ["shifted"], {}, None])
def test_a_choice_that_does_not_exist_is_refused(
    store: Path, tmp_path: Path, name: str, way: object
) -> None:
    run = tmp_path / "run"
    train_tiny(store, run)
    document = read_sealed(run / "run.json")
    document["identity"][name] = way
    write_json(run / "run.json", sealed(document))
    with pytest.raises(InputError, match=f"{name} is one of a.*, got .*. Fix: "):
        train_tiny(store, run)


def test_with_a_sampled_softmax_the_way_is_that_of_before(
    tmp_path: Path, chosen: dict[str, int]
) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)
    train_tiny(store, tmp_path / "run", sampled_softmax=100)
    assert _recorded(tmp_path / "run") == ("attention", "attention")
    train_tiny(store, tmp_path / "same", sampled_softmax=100, loss_way="attention")
    assert_same_bits(tmp_path / "run", tmp_path / "same")
    train_tiny(store, tmp_path / "whole", loss_way="attention")
    weights, whole = (saved_weights(tmp_path / name) for name in ("run", "whole"))
    assert any(not torch.equal(weights[name], whole[name]) for name in whole)  # it did sample


def test_a_sampled_softmax_that_would_save_nothing_is_timed(
    store: Path, tmp_path: Path, chosen: dict[str, int]
) -> None:
    train_tiny(store, tmp_path / "run", sampled_softmax=100_000)
    assert _recorded(tmp_path / "run") == ("shifted", "shifted")


def test_a_version_is_rebuilt_in_the_way_in_which_it_was_released(
    store: Path, tmp_path: Path, chosen: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TINY.with_options(min_lr_ratio=0.1)
    update(lineage=tmp_path / "lineage", store=[str(store)], settings=settings)
    lineage = open_lineage(tmp_path / "lineage")
    assert _recorded(lineage.version(1).root) == ("shifted", "shifted")
    monkeypatch.setattr(calibration, "choose", lambda seconds: "plain")

    release(lineage, 1, settings=settings, out=tmp_path / "again")

    assert _recorded(tmp_path / "again") == ("shifted", "shifted")
    assert_same_bits(tmp_path / "again", lineage.version(1).root)


def test_runs_of_a_sweep_share_one_measurement(
    store: Path, tmp_path: Path, chosen: dict[str, int]
) -> None:
    runs = {"slow": {"learning_rate": 0.01}, "seed": {"seed": 4}, "own": {"loss_way": "attention"}}
    sweep(store, out=tmp_path / "sweep", settings=TINY, runs=runs)
    assert chosen["measured"] == 1
    ways = [_recorded(tmp_path / "sweep" / name)[0] for name in runs]
    assert ways == ["shifted", "shifted", "attention"]
    train_tiny(store, tmp_path / "seed", seed=4, loss_way="shifted")
    assert_same_bits(tmp_path / "sweep/seed", tmp_path / "seed")
