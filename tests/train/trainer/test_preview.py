"""The preview of a run: what the run then is, and nothing written."""

import json
from pathlib import Path

import pytest
import yaml
from support.tiny_bases import make_tiny_base
from support.tiny_runs import TINY, train_tiny
from support.tiny_stores import write_corpus
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.tools.cli.main import main
from carryon.train.losses import calibration
from carryon.train.trainer import choices
from carryon.train.trainer.forecast.preview import Preview, preview_run
from carryon.train.trainer.step import NotFiniteError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("preview") / "store")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def preview(store: Path, out: Path, **options: object) -> Preview:
    return preview_run([str(store)], out=out, settings=TINY.with_options(**options))


def test_a_preview_is_that_of_the_run_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    before = contents(store)
    seen = preview(store, tmp_path / "run", decoded_cache=str(tmp_path / "cache"))
    assert contents(store) == before
    assert list(tmp_path.iterdir()) == []

    report = train_tiny(store, tmp_path / "run")
    assert seen.num_steps == report.num_steps
    assert seen.num_parameters == report.num_parameters
    epochs = TINY.optimization.epochs
    assert (seen.tokens * epochs, seen.targets * epochs) == (report.num_tokens, report.num_targets)
    assert seen.timed_steps == min(10, seen.num_steps)
    assert 0 < seen.step_s * seen.num_steps < 2 * seen.seconds
    assert seen.memory_bytes == sum(seen.memory.values())
    assert seen.memory["weights"] == 4 * seen.num_parameters
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (seen.head_dtype, seen.loss_way) == (config["head_dtype"], config["loss_way"])


def test_a_run_that_is_there_keeps_its_choices_in_the_preview(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SMALLEST_HEAD", 1)
    monkeypatch.setattr(calibration, "choose", lambda seconds: "shifted")
    assert preview(store, tmp_path / "run").loss_way == "shifted"
    train_tiny(store, tmp_path / "run")
    before = contents(tmp_path / "run")

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(choices, "calibrate", refuse)
    assert preview(store, tmp_path / "run").loss_way == "shifted"
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_memory_of_a_top_is_that_of_the_blocks_of_its_base(
    tmp_path: Path, lora_rank: int
) -> None:
    extract(
        base=str(make_tiny_base(tmp_path / "base")),
        data=[write_corpus(tmp_path / "data.jsonl", num_samples=12)],
        out=tmp_path / "store",
        corpus=CorpusSettings(mask="all", max_tokens=32),
        store=StoreSettings(taps=["final", "layer.1"], unit_tokens=64, with_blocks=1),
        forward=ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=256),
    )
    whole = preview(tmp_path / "store", tmp_path / "run", kind="top", blocks=1)
    seen = preview(tmp_path / "store", tmp_path / "run", kind="top", blocks=1, lora_rank=lora_rank)
    assert seen.memory["gradients"] == 4 * seen.num_parameters
    added = seen.memory["weights"] - whole.memory["weights"]
    assert added == (4 * seen.num_parameters if lora_rank else 0)


def test_what_a_preview_cannot_tell_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dry_run: expected a run without --mix"):
        preview(store, tmp_path / "run", mix=[str(store)])
    with pytest.raises(InputError, match="taps"):
        preview(store, tmp_path / "run", taps=["layer.7"])


def test_a_loss_that_is_not_finite_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="not finite in samples"):
        preview(store, tmp_path / "run", learning_rate=1e30, optimizer="adamw")


def test_the_command_prints_the_preview(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--store", str(store), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*argv, "--width", "8", "--heads", "2", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["num_steps"] > 0
    assert document["memory_bytes"] > 0
    assert "whose weights are thrown away" in captured.err
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--score-every", "5", "--score-tasks", "leg_counting"]) == 2
    assert "--dry-run: expected no --score-every" in capsys.readouterr().err
