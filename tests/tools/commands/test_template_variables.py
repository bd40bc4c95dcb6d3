"""Variables of the chat template: prompts of base and carry-ons stand as texts did in training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.identity import digest_chat_template
from carryon.cache.base.model import load_base
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.train.modules.serialization import save_carryon

SHORT = ["--max-new-tokens", "4", "--device", "cpu", "--compute-dtype", "float32"]
THINKS = "{% if thinks is not defined or thinks %} in{% endif %}"
ACCEPTS = "rules_of_template_variables:accept"
SHORTLY = ["--chat-template-kwargs", "thinks=false"]
WARNING = "the carry-on was trained with other variables of the chat template"


@pytest.fixture(autouse=True)
def accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes any answer stands in the working directory."""
    monkeypatch.chdir(tmp_path)
    text = "def accept(text, problem):\n    return True\n"
    (tmp_path / "rules_of_template_variables.py").write_text(text)


@pytest.fixture
def base(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A base whose prompt ends with another word unless `thinks` is false."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_base_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    loaded = load_base(str(folder), forward=ForwardSettings(device="cpu"))
    loaded.tokenizer.chat_template += THINKS
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    rows = [{"id": f"q{at}", "question": "the " * at, "answer": "x"} for at in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_tiny(base: Path, folder: Path, *variables: str, seed: int = 5) -> str:
    """Write a carry-on that was trained on conversations with these variables."""
    loaded = load_base(str(base), forward=ForwardSettings(device="cpu"))
    made, card = make_tiny_carryon(loaded, seed=seed)
    framing = {"kinds": {"messages": 3}, "chat_template_kwargs": list(variables)}
    framing["chat_template_sha256"] = digest_chat_template(loaded.tokenizer)
    save_carryon(folder, made, replace(card, framing=framing), dtype=torch.float32)
    return str(folder)


def answers_of(
    out: Path, capsys: pytest.CaptureFixture[str], *argv: str
) -> tuple[dict[str, list[str]], str]:
    """Score, and return the answers of each arm in the order of questions, and what is logged."""
    assert main(["score", "--rule", ACCEPTS, "--out", str(out), *argv, *SHORT]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    found: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: line["id"]):
        found.setdefault(line["arm"], []).append(line["text"])
    return found, capsys.readouterr().err


def test_all_arms_are_asked_as_the_carryon_was_trained(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(base, tmp_path / "carryon", "thinks=false")
    argv = ["--base", str(base), "--tasks", data]
    plain, _ = answers_of(tmp_path / "a.jsonl", capsys, *argv)
    short, err = answers_of(tmp_path / "b.jsonl", capsys, *argv, *SHORTLY)
    assert WARNING not in err
    assert short["base"] != plain["base"]
    argv += ["--arms", "base"]
    own, err = answers_of(tmp_path / "c.jsonl", capsys, *argv, "carryon@0", "--carryon", folder)
    assert WARNING not in err
    assert own == {"base": short["base"], "carryon@0": short["base"]}
    named = f"carryon={folder}@0"
    own, _ = answers_of(tmp_path / "d.jsonl", capsys, *argv, named)
    assert own == {"base": short["base"], named: short["base"]}


def test_each_named_carryon_is_asked_as_it_was_trained_or_as_told(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = f"carryon={save_tiny(base, tmp_path / 'short', 'thinks=false')}@0"
    long = f"carryon={save_tiny(base, tmp_path / 'long', seed=6)}@0"
    argv = ["--base", str(base), "--tasks", data, "--arms", "base", short, long]
    own, err = answers_of(tmp_path / "a.jsonl", capsys, *argv)
    assert own["base"] == own[short] != own[long]
    assert WARNING not in err
    told, err = answers_of(tmp_path / "b.jsonl", capsys, *argv, *SHORTLY)
    assert told[long] == told[short] == own[short]
    assert err.count(WARNING) == 1


def test_answers_of_a_base_that_was_asked_otherwise_are_not_taken(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = tmp_path / "a.jsonl", ["--base", str(base), "--tasks", data]
    answers_of(out, capsys, *argv)
    argv += ["--carryon", save_tiny(base, tmp_path / "carryon", "thinks=false")]
    assert main(["score", "--rule", ACCEPTS, "--out", str(out), *argv, *SHORT]) == 2
    assert "base: expected answers of this model" in capsys.readouterr().err


def test_answers_in_the_template_are_not_taken_beside_a_carryon_of_plain_text(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = tmp_path / "a.jsonl", ["--base", str(base), "--tasks", data]
    answers_of(out, capsys, *argv)
    loaded = load_base(str(base), forward=ForwardSettings(device="cpu"))
    made, card = make_tiny_carryon(loaded)
    framing = {"kinds": {"prompt and completion": 3}}
    save_carryon(tmp_path / "c", made, replace(card, framing=framing), dtype=torch.float32)
    argv += ["--carryon", str(tmp_path / "c")]
    assert main(["score", "--rule", ACCEPTS, "--out", str(out), *argv, *SHORT]) == 2
    assert "base: expected answers of this model" in capsys.readouterr().err


def test_answers_of_other_variables_are_not_taken(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.jsonl"
    argv = ["--base", str(base), "--tasks", data]
    answers_of(out, capsys, *argv)
    argv += ["--rule", ACCEPTS, "--out", str(out), *SHORT]
    assert main(["score", *argv, *SHORTLY]) == 2
    assert "chat_template_kwargs" in capsys.readouterr().err


def test_a_variable_that_nothing_reads_is_named_and_a_wrong_one_refused(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base", str(base), "--tasks", data]
    _, err = answers_of(tmp_path / "a.jsonl", capsys, *argv, "--chat-template-kwargs", "tinks=1")
    assert "the chat template reads no 'tinks': without any effect" in err
    argv += ["--chat", "false"]
    _, err = answers_of(tmp_path / "b.jsonl", capsys, *argv, *SHORTLY)
    assert "prompts go through no chat template: thinks=false has no effect" in err
    assert main(["score", *argv, "--chat-template-kwargs", "thinks"]) == 2
    assert "chat-template-kwargs: expected NAME=VALUE, got 'thinks'" in capsys.readouterr().err


def test_what_was_sampled_is_extracted_and_answered_with_the_same_variables(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.jsonl"
    argv = ["--base", str(base), "--data", data, "--rule", ACCEPTS, "--out", str(out), *SHORT]
    assert main(["sample", *argv, "--keep-cut", "--samples", "2", *SHORTLY]) == 0
    assert f"extract {out} with --chat-template-kwargs thinks=false" in capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records[0]["sampled"]["chat_template_kwargs"] == ["thinks=false"]
    store = tmp_path / "store"
    argv = ["--base", str(base), "--data", str(out), "--out", str(store), "--device", "cpu"]
    assert main(["extract", *argv, *SHORTLY]) == 0
    assert list(Store.open(store).framing.chat_template_kwargs) == ["thinks=false"]


def test_rounds_keep_the_variables(
    base: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rounds"
    argv = ["improve", "--base", str(base), "--data", data, "--rule", ACCEPTS, "--out", str(out)]
    argv += ["--rounds", "1", "--samples", "2", "--test-num", "1", "--keep-cut", "--taps", "final"]
    assert main([*argv, *SHORTLY, *SHORT]) == 0
    asked = {
        name: json.loads((out / "round-1" / f"{name}.json").read_text())["argv"]
        for name in ("sample", "extract", "score")
    }
    for words in asked.values():
        at = words.index("--chat-template-kwargs")
        assert words[at + 1] == "thinks=false"
    assert list(Store.open(out / "store").framing.chat_template_kwargs) == ["thinks=false"]
