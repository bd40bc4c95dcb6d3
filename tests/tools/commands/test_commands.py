"""The commands on a tiny base."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carryon.tools.cli.main import main
from carryon.train.trainer.held_out.nll import shown_nll

# 12 samples of 6 to 28 tokens in units of 64: several units, and a unit with several samples.
UNIT_TOKENS = 64
TINY_CARRYON = ["--width", "8", "--heads", "2", "--blocks", "1", "--intermediate-size", "8"]
TINY_RUN = [*TINY_CARRYON, "--epochs", "2", "--tokens-per-step", "64", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A folder with a corpus, its store, and a run, each made by the command."""
    root = tmp_path_factory.mktemp("commands")
    records = [
        {"id": f"r{i}", "prompt": "the " * (i % 5 + 1), "completion": "thing " * (i % 3 + 1)}
        | ({"split": "held-out"} if i % 4 == 0 else {})
        for i in range(12)
    ]
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    extract = ["extract", "--base", str(tiny_base_folder), "--data", str(corpus)]
    extract += ["--out", str(root / "store"), "--unit-tokens", str(UNIT_TOKENS)]
    extract += ["--taps", "final", "layer.1", "--device", "cpu", "--compute-dtype", "float32"]
    assert main(extract) == 0
    train = ["train", "--store", str(root / "store"), "--out", str(root / "run"), *TINY_RUN]
    assert main(train) == 0
    return root


def pickled(base: Path, folder: Path) -> Path:
    """Return a copy of a base whose weights are in a pickle file."""
    copy = Path(shutil.copytree(base, folder))
    [path] = copy.glob("*.safetensors")
    torch.save(load_file(path), copy / "pytorch_model.bin")
    path.unlink()
    return copy


@pytest.mark.parametrize(
    "name", ["extract", "repair", "generate", "score", "merge", "update", "compare"]
)
def test_each_command_that_loads_a_base_has_the_option_that_an_error_names(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help-all"])
    assert "--allow-pickle" in capsys.readouterr().out


def test_an_update_reads_pickled_weights_where_that_is_allowed(
    work: Path, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = pickled(tiny_base_folder, tmp_path / "base")
    words = ["update", "--lineage", str(tmp_path / "lineage"), "--base", str(base), *TINY_RUN]
    words += ["--data", str(work / "corpus.jsonl"), "--min-lr-ratio", "0.1"]
    assert main(words) == 2
    assert "--allow-pickle" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "--allow-pickle"]) == 0


def last_json(captured: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(captured.splitlines()[-1])
    return found


def test_inspect_prints_text(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(work / "store")]) == 0
    text = capsys.readouterr().out
    for part in ("12, 3 of them held out", "of raw bfloat16", "LlamaForCausalLM"):
        assert part in text
    assert "after the final norm" in text
    assert "after block 1, not normed" in text
    assert "corpus.jsonl" in text
    assert "transformers" in text


def test_inspect_counts_groups_where_there_are_any(
    work: Path, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(work / "store")])
    assert "groups" not in capsys.readouterr().out
    rows = [{"text": f"thing {number}", "of": number % 3} for number in range(12)]
    data, store = tmp_path / "data.jsonl", tmp_path / "store"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--base", str(tiny_base_folder), "--data", str(data), "--column", "split_group=of"]
    assert main(["extract", *words, "--out", str(store), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(store)]) == 0
    assert re.search(r"groups +3: samples of one record or split group", capsys.readouterr().out)


def test_inspect_and_a_dry_run_show_what_was_read_and_lost(
    work: Path, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text((work / "corpus.jsonl").read_text() + "{no json\n")
    words = ["--base", str(tiny_base_folder), "--data", str(data), "--bad-rows", "skip"]
    words += ["--out", str(tmp_path / "store"), "--unit-tokens", str(UNIT_TOKENS)]
    words += ["--device", "cpu", "--tokenizer-workers", "1"]
    assert main(["extract", *words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[-1])
    assert (facts["report"]["records"], facts["report"]["kept"]) == (13, 12)
    assert not (tmp_path / "store").exists()
    rows = ["records read", "records kept", "bad row"]
    assert all(row in captured.err for row in rows)
    assert f"warning: bad row: 1 of 13 records, the first is {data}:13." in captured.err

    assert main(["extract", *words]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "store")]) == 0
    text = capsys.readouterr().out
    assert all(row in text for row in rows)
    assert f"{data}:13" in text
    assert main(["inspect", str(tmp_path / "store"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["report"] == facts["report"]
    assert sum(shown["kinds"].values()) == 12


def test_inspect_of_a_store_from_before_shows_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(Path(__file__).parents[2] / "data/before.tar.xz") as archive:
        archive.extractall(
            tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # since 3.11.4
    assert main(["inspect", str(tmp_path / "store")]) == 0
    assert "records read" not in capsys.readouterr().out


def test_inspect_json_is_one_line_whose_sums_are_right(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(work / "store"), "--json"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    facts = json.loads(output)
    on_disk = sum(path.stat().st_size for path in (work / "store").rglob("*") if path.is_file())
    assert facts["bytes"] == on_disk == sum(facts["array_bytes"].values())
    assert facts["raw_bytes_per_tap"] == facts["tokens"] * 16 * 2  # D = 16, bfloat16
    stored = facts["array_bytes"]["hidden/layer.1"]
    assert facts["ratio_to_raw"]["layer.1"] == round(stored / facts["raw_bytes_per_tap"], 4)
    assert facts["finished_units"] == facts["units"] > 1
    assert 0 < facts["supervised_tokens"] < facts["tokens"]


def test_inspect_shows_an_unfinished_store(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(work / "store", store)
    (store / "units" / "1.json").unlink()
    assert main(["inspect", str(store)]) == 0
    assert "UNFINISHED" in capsys.readouterr().out


def test_extract_again_computes_nothing(
    work: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["extract", "--base", str(tiny_base_folder), "--data", str(work / "corpus.jsonl")]
    argv += ["--out", str(work / "store"), "--unit-tokens", str(UNIT_TOKENS)]
    argv += ["--taps", "final", "layer.1", "--device", "cpu", "--compute-dtype", "float32"]
    assert main(argv) == 0
    report = last_json(capsys.readouterr().out)
    assert report["computed_units"] == 0
    assert report["is_finished"]


def test_extract_with_another_setting_is_refused(
    work: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["extract", "--base", str(tiny_base_folder), "--data", str(work / "corpus.jsonl")]
    argv += ["--out", str(work / "store"), "--unit-tokens", "128", "--device", "cpu"]
    assert main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("carryon extract: error: ")


def test_the_config_of_a_run_repeats_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--config", str(work / "run" / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    report = last_json(capsys.readouterr().out)
    assert report["out"] == str(tmp_path / "run")
    first, second = (
        (run / "carryon" / "carryon.safetensors").read_bytes()
        for run in (work / "run", tmp_path / "run")
    )
    assert first == second


def test_evaluate_agrees_with_the_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["evaluate", "--store", str(work / "store"), "--carryon", str(work / "run" / "carryon")]
    assert main(argv) == 0
    captured = capsys.readouterr()
    report = last_json(captured.out)
    result = json.loads((work / "run" / "result.json").read_text())
    assert report["base_nll"] == pytest.approx(result["base_nll"], rel=1e-6)
    assert report["carryon_nll"] == pytest.approx(result["carryon_nll"], rel=1e-6)
    assert "held-out" in captured.err
    assert main([*argv, "--alpha", "0"]) == 0
    report = last_json(capsys.readouterr().out)
    assert report["carryon_nll"] == report["base_nll"]


def test_generate_compares_base_and_customized_model(
    work: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--carryon", str(work / "run" / "carryon"), "--prompt", "the thing"]
    argv += ["--base", str(tiny_base_folder), "--max-new-tokens", "4", "--device", "cpu"]
    argv += ["--compute-dtype", "float32"]
    assert main([*argv, "--compare"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("base ")
    assert "| base + carry-on (alpha 1)" in text
    assert main(argv) == 0


def test_generate_frames_the_prompt_as_in_training_or_warns(
    work: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((work / "run" / "carryon" / "carryon.json").read_text(encoding="utf-8"))
    assert card["framing"]["kinds"] == {"prompt and completion": 12}
    argv = ["generate", "--carryon", str(work / "run" / "carryon"), "--prompt", "the thing"]
    argv += ["--base", str(tiny_base_folder), "--max-new-tokens", "4", "--device", "cpu"]
    argv += ["--compute-dtype", "float32"]
    answers = []
    for options, num_warnings in ([], 0), (["--chat", "false"], 0), (["--chat", "true"], 1):
        assert main([*argv, *options]) == 0
        captured = capsys.readouterr()
        answers.append(captured.out)
        assert captured.err.count("warning: the carry-on was trained on plain text") == num_warnings
    assert answers[0] == answers[1]
    assert main([*argv, "--compare", "--chat", "true"]) == 0
    assert capsys.readouterr().err.count("warning: ") == 1
    assert main([*argv, "--chat", "maybe"]) == 2
    assert "--chat: expected auto, true or false, got 'maybe'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["evaluate", "--store", "STORE", "--carryon", "none"], "none: expected a carry-on"),
        (["train", "--store", "STORE", "--out", "RUN", "--taps", "layer.2"], "layer.2"),
        (["train", "--store", "none", "--out", "RUN"], "none: expected a store"),
        (["train", "--store", "STORE", "--out", "RUN", "--epochs", "0"], "epochs: expected 1"),
        (["generate", "--carryon", "none", "--prompt", "x"], "none: expected a carry-on"),
        (["extract", "--base", "./none", "--data", "x", "--out", "RUN"], "'./none'"),
        (
            ["extract", "--base", "b", "--data", "x", "--out", "RUN", "--max-disk", "9 miles"],
            "--max-disk: expected a size such as 500MB or 20GB, got '9 miles'",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_wrong_input_writes_nothing(
    argv: list[str],
    text: str,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"STORE": str(work / "store"), "RUN": str(tmp_path / "new")}
    assert main([places.get(word, word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert text in error.splitlines()[-1]
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def lineage(work: Path, tiny_base_folder: Path) -> Path:
    """A lineage of two versions, from texts."""
    for number in (1, 2):
        records = [{"id": f"{number}-{i}", "text": "the thing " * (i % 4 + 2)} for i in range(12)]
        corpus = work / f"{number}.jsonl"
        corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
        update = ["update", "--lineage", str(work / "lineage"), "--data", str(corpus)]
        options = TINY_RUN if number == 1 else []  # later updates take those of the first one
        assert main([*update, "--base", str(tiny_base_folder), *options]) == 0
    return work / "lineage"


def test_versions_are_shown_as_a_table_and_as_json_lines(
    lineage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "--lineage", str(lineage), "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    first, second = map(json.loads, shown.out.splitlines())
    table = shown.err[shown.err.index("held-out loss  ") :].splitlines()
    assert table[0].split()[2:] == ["increment", "1", "increment", "2"]
    rows = {"base": first["base"], "version 1": first["held_out"]}
    rows["version 2"] = second["held_out"]
    for line, (name, losses) in zip(table[1:4], rows.items(), strict=True):
        assert line.startswith(name)
        assert all(shown_nll(loss["loss"], loss["se"]) in line for loss in losses)
    assert table[4].split() == ["targets", *(str(loss["targets"]) for loss in first["held_out"])]
    assert table[8].split()[:3] == ["version", "2", f"{second['total_steps']:,}"]
    ratio = second["total_steps"] / second["from_scratch_steps"]
    assert shown.err.splitlines()[-1].endswith(f"a ratio of {ratio:.2f}")
    assert ratio < 1
    assert (lineage / "versions.png").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--also-from-scratch"], "expected with --new-base, got none"),
        (["--new-base", "b"], "expected --old-lineage, and neither --base nor --store"),
        (["--old-lineage", "l", "--new-base", "b"], "l: expected a lineage, found none"),
    ],
)
def test_a_new_base_needs_an_old_lineage(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["update", "--lineage", str(tmp_path / "new"), *words]) == 2
    assert expected in capsys.readouterr().err
