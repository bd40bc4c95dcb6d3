"""`carryon import` and `carryon export` on a tiny base."""

import json
import sys
from pathlib import Path

import pytest
from support.tiny_server import serving
from support.tiny_stores import write_corpus

from carryon.cache.base.model import Base
from carryon.tools.bench.exchange.state_files import make_tokens, write_states
from carryon.tools.cli.main import main

TINY_RUN = ["--width", "8", "--heads", "2", "--blocks", "1", "--intermediate-size", "8"]
TINY_RUN += ["--epochs", "1", "--tokens-per-step", "64", "--device", "cpu"]


@pytest.fixture
def imported(tiny_base: Base, tiny_base_folder: Path, store_tmp: Path) -> list[str]:
    """The words of an import."""
    folder = write_states(store_tmp / "states", tiny_base, make_tokens(12))
    words = ["import", "vllm", str(folder), "--base", str(tiny_base_folder)]
    words += ["--out", str(store_tmp / "store"), "--unit-tokens", "64", "--device", "cpu"]
    return [*words, "--layer-ids", "0", "1", "2", "--compute-dtype", "float32"]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    line: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return line


def test_an_imported_store_is_verified_trained_exported_and_imported_again(
    imported: list[str], store_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*imported, "--taps", "final", "prenorm", "layer.1"]) == 0
    report = last_line(capsys)
    assert (report["imported_files"], report["is_finished"]) == (12, True)
    store = str(store_tmp / "store")
    assert main(["verify", store, "--full"]) == 0
    assert main(["inspect", store]) == 0
    assert "layer_ids" in capsys.readouterr().out
    run = ["train", "--store", store, "--out", str(store_tmp / "run"), "--taps", "final", "layer.1"]
    assert main([*run, *TINY_RUN]) == 0
    assert main(["export", "speculators", store, "--out", str(store_tmp / "data")]) == 0
    capsys.readouterr()
    again = [*imported[:2], str(store_tmp / "data"), *imported[3:]]
    del again[again.index("--layer-ids") : again.index("--layer-ids") + 4]  # the files name them
    again[again.index("--out") + 1] = str(store_tmp / "again")
    assert main(again) == 0
    assert last_line(capsys)["imported_files"] == 12


def test_errors_are_one_line_and_code_2(
    imported: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*imported[:-5], "2", "1"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("carryon import: error: --layer-ids: expected ascending ids")
    assert main(["import", "trtllm", *imported[2:]]) == 2
    assert "vllm" in capsys.readouterr().err
    assert main(["import", "vllm", "/nowhere", *imported[3:]]) == 2
    assert "/nowhere: expected a folder" in capsys.readouterr().err


def test_a_store_is_recoded_and_a_mistake_is_one_line(
    store_folder: Path, store_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recode", str(store_folder), "--out", str(store_tmp / "near"), "--profile", "near"]
    assert main(words) == 0
    report = last_line(capsys)
    assert (report["profile"], report["recoded_units"]) == ("near", report["num_units"])
    assert main(words) == 0  # nothing is left to do
    assert last_line(capsys)["recoded_units"] == 0
    raw = ["recode", str(store_tmp / "near"), "--out", str(store_tmp / "raw"), "--profile", "raw"]
    assert main(raw) == 0
    assert main(["inspect", str(store_tmp / "raw")]) == 0
    assert "profile raw, of states rounded by the profile near" in capsys.readouterr().out
    assert main([*raw[:-1], "exact"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("carryon recode: error: ")
    assert line.endswith("Fix: --profile raw, or carryon extract again")


def test_extraction_by_a_server_from_the_command_line(
    tiny_base: Base, tiny_base_folder: Path, store_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_corpus(store_tmp / "texts.jsonl", num_samples=8)
    words = ["extract", "--base", str(tiny_base_folder), "--data", str(data), "--unit-tokens", "64"]
    words += ["--out", str(store_tmp / "store"), "--compute-dtype", "float32", "--max-tokens", "60"]
    with serving(tiny_base, store_tmp / "served") as server:
        words += ["--endpoint", server.url, "--states-folder", str(server.folder)]
        assert main([*words, "--requests", "2"]) == 0
        report = last_line(capsys)
        assert (report["is_finished"], report["computed_units"]) == (True, report["num_units"])
        assert main(words) == 0
        assert last_line(capsys)["computed_units"] == 0
    assert main(["verify", str(store_tmp / "store"), "--full"]) == 0
    assert main(["inspect", str(store_tmp / "store")]) == 0
    assert "vllm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--backend", "vllm", "--dry-run"], "--dry-run: expected it with --backend transformers"),
        (["--backend", "vllm", "--align-to", "x"], "--align-to: expected it with --backend trans"),
        (["--requests", "3"], "--requests: expected it with --backend vllm or --endpoint only"),
        (["--endpoint", "http://a", "--vllm-args", "a=1"], "--vllm-args: expected it for vLLM"),
        (["--endpoint", "http://a"], "--states-folder: expected the folder"),
        (["--backend", "vllm", "--layer-ids", "1"], "--layer-ids: expected it for --endpoint only"),
        (["--backend", "vllm", "--vllm-args", "model=x"], "--vllm-args: expected arguments that"),
        (
            ["--backend", "vllm", "--quantize", "int8"],
            "--quantize int8: expected it for --backend t",
        ),
        (["--backend", "vllm", "--vllm-python", "/no"], "--vllm-python: expected the Python"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(
    tiny_base_folder: Path,
    store_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: str,
) -> None:
    monkeypatch.setenv("CARRYON_VLLM_PYTHON", sys.executable)
    data = write_corpus(store_tmp / "texts.jsonl", num_samples=8)
    extract = ["extract", "--base", str(tiny_base_folder), "--data", str(data)]
    assert main([*extract, "--out", str(store_tmp / "store"), *words]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert says in line
    assert "Fix: " in line
    assert not (store_tmp / "store").exists()
