"""Damaged files of a run: noticed, named, and rebuilt or skipped; the result has the same bits."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import (
    Killed,
    assert_same_bits,
    kill_at,
    metrics_without_times,
    train_tiny,
    without_plots,
)
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.train.trainer.checkpoint import OPTIMIZER, STATE, WEIGHTS
from carryon.train.trainer.finish import TrainReport

BEST: dict[str, Any] = {
    "finish_with": "best",
    "checkpoint_every": 2,
    "evaluate_every": 3,
    "dropout": 0.2,
}
DOCUMENTS = ["run.json", "contamination.json", "metrics.jsonl", "sessions.jsonl", "result.json"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("damage") / "store")


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with without_plots():
        train_tiny(store, out, **BEST)
    return out


@pytest.fixture(scope="module")
def stopped(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run killed before its 9th step: its newest checkpoints are of steps 6 and 8."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            train_tiny(store, out, **BEST)
    return out


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_plots() -> Iterator[None]:
    with without_plots():
        yield


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = step(run, 8) / STATE
    document = json.loads(path.read_text())
    change(document)
    write_json(path, document)


def resign(path: Path, **progress: object) -> None:
    document = read_sealed(path)
    document["progress"].update(progress)
    write_json(path, sealed(document))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of a weight": lambda run: flip(step(run, 8) / WEIGHTS, -9),
    "a byte of the weights' header": lambda run: flip(step(run, 8) / WEIGHTS, 30),
    "a byte of the optimizer": lambda run: flip(step(run, 8) / OPTIMIZER, -9),
    "a byte of the state": lambda run: flip(step(run, 8) / STATE, 40),
    "the state's last newline": lambda run: flip(step(run, 8) / STATE, -1),
    "weights cut short": lambda run: (step(run, 8) / WEIGHTS).write_bytes(b"1234"),
    "no optimizer": lambda run: (step(run, 8) / OPTIMIZER).unlink(),
    "a folder for the weights": lambda run: (
        (step(run, 8) / WEIGHTS).unlink(),
        (step(run, 8) / WEIGHTS).mkdir(),
    ),
    "another step": lambda run: edit(run, lambda state: state["progress"].update(step=7)),
    "without its digest": lambda run: edit(run, lambda state: state.pop("sha256")),
    "nested too deeply": lambda run: (step(run, 8) / STATE).write_text("[" * 100_000),
    "a text for a number, signed": lambda run: resign(step(run, 8) / STATE, line_targets="x"),
    "older weights": lambda run: shutil.copy(step(run, 6) / WEIGHTS, step(run, 8) / WEIGHTS),
    "an older step under a newer name": lambda run: shutil.copytree(
        step(run, 6), step(run, 8), dirs_exist_ok=True
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_gives_the_same_bits(
    store: Path, whole: Path, run: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    DAMAGE[name](run)

    train_tiny(store, run, **BEST)

    [warning] = [
        each.getMessage() for each in caplog.records if "resumes from" in each.getMessage()
    ]
    assert "step-00000008" in warning
    assert "The run resumes from step-00000006" in warning
    assert_same_bits(run, whole)
    assert metrics_without_times(run) == metrics_without_times(whole)


def test_without_a_sound_checkpoint_one_line_says_what_to_delete(
    store: Path, whole: Path, run: Path
) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        flip(path / OPTIMIZER, -1)

    with pytest.raises(InputError, match="Fix: delete .*checkpoints; the same command") as caught:
        train_tiny(store, run, **BEST)

    assert "\n" not in str(caught.value)
    shutil.rmtree(run / "checkpoints")
    train_tiny(store, run, **BEST)
    assert_same_bits(run, whole)


def test_a_damaged_best_checkpoint_is_noticed_before_the_run_ends(
    store: Path, whole: Path, run: Path
) -> None:
    best = json.loads((run / "checkpoints" / "best.json").read_text())["folder"]
    flip(run / "checkpoints" / best / WEIGHTS, -1)

    try:
        train_tiny(store, run, **BEST)
    except InputError as error:  # no checkpoint is older than the best one
        assert best in str(error)  # noqa: PT017
    else:
        assert_same_bits(run, whole)


def test_a_run_does_not_end_without_its_best_checkpoint(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rising = {"learning_rate": 0.5, "schedule": "constant", "epochs": 20, "patience": 2}
    report = train_tiny(store, run, **rising)
    assert report.finished_with_step < report.num_steps
    (run / "result.json").unlink()
    shutil.rmtree(step(run, report.finished_with_step))

    with pytest.raises(InputError, match="expected the checkpoint of the best step"):
        train_tiny(store, run, **rising)


def test_a_checkpoint_from_before_digests_resumes(store: Path, whole: Path, run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        document = json.loads((path / STATE).read_text())
        del document["sha256"], document["files"]
        write_json(path / STATE, document | {"format_version": 1})

    train_tiny(store, run, **BEST)

    assert_same_bits(run, whole)


def test_damaged_weights_without_digests_are_skipped_too(
    store: Path, whole: Path, run: Path
) -> None:
    edit(run, lambda state: (state.pop("sha256"), state.update(format_version=1)))
    (step(run, 8) / WEIGHTS).write_bytes(b"1234")

    train_tiny(store, run, **BEST)

    assert_same_bits(run, whole)


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"{}\n", b"[1]\n", b'{"step": "x"}\n'])
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_damaged_document_is_rebuilt(
    store: Path,
    whole: Path,
    run: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    is_finished: bool,
) -> None:
    out = shutil.copytree(whole, tmp_path / "finished") if is_finished else run
    (out / name).write_bytes(content)

    report = train_tiny(store, out, **BEST)

    assert_same_bits(out, whole)
    assert report.carryon_nll == TrainReport.read(whole / "result.json").carryon_nll
    assert json.loads((out / "run.json").read_text())["identity"]
    if name != "metrics.jsonl":
        assert metrics_without_times(out) == metrics_without_times(whole)
    train_tiny(store, out, **BEST)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_folder_or_a_link_for_a_document_is_one_line_or_harmless(
    store: Path, whole: Path, run: Path, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for place, make in (("link", lambda path: path.symlink_to(mine)), ("folder", Path.mkdir)):
        out = shutil.copytree(run, tmp_path / place)
        (out / name).unlink(missing_ok=True)
        make(out / name)
        try:
            train_tiny(store, out, **BEST)
        except CarryOnError as error:
            assert name in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert_same_bits(out, whole)
        assert mine.read_text() == "precious"


def test_changed_numbers_in_a_report_are_noticed(
    store: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    document = json.loads((out / "result.json").read_text())
    write_json(out / "result.json", document | {"carryon_nll": 0.1})

    report = train_tiny(store, out, **BEST)

    assert report.carryon_nll == document["carryon_nll"]
    assert "result.json: the content differs from its SHA-256" in caplog.text


CARRYON_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of a weight": lambda carryon: flip(carryon / WEIGHTS, -9),
    "a byte of the card": lambda carryon: flip(carryon / "carryon.json", 40),
    "no weights": lambda carryon: (carryon / WEIGHTS).unlink(),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("name", CARRYON_DAMAGE)
def test_the_damaged_carryon_of_a_finished_run_is_written_again(
    store: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    CARRYON_DAMAGE[name](out / "carryon")

    report = train_tiny(store, out, **BEST)

    assert report.carryon_nll == TrainReport.read(whole / "result.json").carryon_nll
    assert_same_bits(out, whole)
    assert "The run is finished again from its last checkpoint" in caplog.text


def test_a_damaged_carryon_without_checkpoints_is_no_reason_to_train_for_days(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    train_tiny(store, out, **BEST)
    CARRYON_DAMAGE["a byte of a weight"](out / "carryon")

    with pytest.raises(InputError, match=r"SHA-256.*Fix: put a copy of the carry-on there, or del"):
        train_tiny(store, out, **BEST)


def test_a_report_whose_digests_are_something_else_is_no_traceback(
    store: Path, whole: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    write_json(run / "result.json", sealed(read_sealed(run / "result.json") | {"files": "x"}))

    train_tiny(store, run, **BEST)

    assert_same_bits(run, whole)
