"""`carryon preview`, and `carryon inspect --sample`, on a tiny base."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base

from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main

MESSAGES = [{"role": "user", "content": "the <b>\x1b[31m"}, {"role": "assistant", "content": "an"}]
SHOWN = "{<|im_start|>}user\nthe <b>\\x1b[31m{<|im_end|>}\n{<|im_start|>}assistant\n"
SHOWN += "[[an{<|im_end|> = stop}]]\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with five conversations and a folder's worth of other kinds."""
    root = tmp_path_factory.mktemp("data")
    kinds: dict[str, list[dict[str, Any]]] = {
        "chats": [{"id": f"chat-{n}", "messages": MESSAGES} for n in range(5)],
        "prompts": [{"prompt": "a", "completion": "b", "split": "held-out"}],
    }
    for name, rows in kinds.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(*argv: object) -> int:
    """Run the command line."""
    return main([str(word) for word in argv])


def test_a_preview_shows_samples_table_and_figures(
    tiny_base_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("preview", "--base", tiny_base_folder, "--data", data, "--rows", 2) == 0
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 2
    assert "--- messages  chat-1  " in out
    assert "[[b{<|im_end|> = stop}]]" in out
    assert "2 targets, held out" in out
    assert "records kept      3  100.0%" in out
    figures = json.loads(out.splitlines()[-1])
    assert figures["kinds"] == {"messages": 2, "prompt and completion": 1}
    assert (figures["records"], figures["kept"], figures["samples"]) == (3, 3, 3)
    assert figures["targets"] == 3 * 2
    assert figures["report"]["records"] == 3


def test_a_preview_never_reads_the_weights(
    tiny_base_folder: Path, data: Path, tmp_path: Path
) -> None:
    base = make_tiny_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    assert run("preview", "--base", base, "--data", data) == 0


def test_a_preview_may_be_a_page(tiny_base_folder: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    assert run("preview", "--base", tiny_base_folder, "--data", data, "--html", page) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<h2>messages  chat-") == 3
    assert "&lt;b&gt;\\x1b[31m" in text
    assert '<span class="target special stop">&lt;|im_end|&gt;</span>' in text


def test_a_terminal_gets_colours_and_any_encoding_a_preview(
    tiny_base_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    (tmp_path / "text.txt").write_text("\u4f60 the", encoding="utf-8")
    terminal = Terminal(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert run("preview", "--base", tiny_base_folder, "--data", tmp_path / "text.txt") == 0
    assert isinstance(terminal.buffer, io.BytesIO)
    assert b"\x1b[32m\\u4f60 the\x1b[0m" in terminal.buffer.getvalue()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--rows", "0"], "--rows: expected 1 or more, got 0"),
        (["--max-tokens", "1000"], "--max-tokens: expected at most 128, the base's context, got"),
        (["--chat-template", "gone.jinja"], "gone.jinja: expected a readable file"),
    ],
)
def test_a_preview_that_cannot_be_made_is_refused(
    options: list[str],
    problem: str,
    tiny_base_folder: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("preview", "--base", tiny_base_folder, "--data", data, *options) == 2
    assert problem in capsys.readouterr().err


def test_data_without_a_record_are_refused(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert run("preview", "--base", tiny_base_folder, "--data", tmp_path / "empty.jsonl") == 2
    assert "--data: expected at least one record, got none in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def store(data: Path, tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the conversations."""
    out = tmp_path_factory.mktemp("stores") / "store"
    options = ["--unit-tokens", "64", "--device", "cpu", "--compute-dtype", "float32"]
    argv = ["--base", tiny_base_folder, "--data", data / "chats.jsonl", "--out", out]
    assert run("extract", *argv, *options) == 0
    return out


def test_inspect_shows_a_sample_as_the_preview_does(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run("inspect", store, "--sample", "chat-3", "--html", page) == 0
    out = capsys.readouterr().out
    index = Store.open(store).index_of("chat-3")
    assert f"--- messages  chat-3  31 tokens, 2 targets  ({store}, number {index})\n{SHOWN}" in out
    assert "<h2>messages  chat-3" in page.read_text(encoding="utf-8")
    assert run("inspect", store, "--sample", index, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    assert (facts["id"], facts["num_targets"]) == ("chat-3", 2)
    assert [piece["text"] for piece in facts["pieces"] if piece["is_target"]] == [
        "an",
        "<|im_end|>",
    ]


def test_inspect_refuses_a_sample_that_is_not_there_and_another_tokenizer(
    store: Path, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gone", "5", "-1", "9" * 30):
        assert run("inspect", store, f"--sample={name}") == 2
        error = capsys.readouterr().err
        assert f"--sample: expected an id, or a number from 0 to 4, got '{name}'" in error
    assert run("inspect", store, "--html", tmp_path / "page.html") == 2
    assert "expected --sample beside them" in capsys.readouterr().err
    base = make_tiny_base(tmp_path / "base")
    document = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    document["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert run("inspect", store, "--sample", 0, "--base", base) == 2
    assert f"{base}: expected the tokenizer that {store} was made with" in capsys.readouterr().err
    assert run("inspect", store, "--sample", 0, "--base", tiny_base_folder) == 0
