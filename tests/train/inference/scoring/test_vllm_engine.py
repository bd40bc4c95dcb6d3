"""Answers of vLLM: requests, failures, its end; and the real one beside transformers."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_vllm import HAS_VLLM, WITHOUT_VLLM, make_tiny_vllm, wait_for_the_end_of

from carryon.cache.errors import EngineError, InputError
from carryon.cache.exchange.engine.vllm_process import PYTHON_VARIABLE
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.scoring.measure import measure
from carryon.train.inference.scoring.problems import read_problems
from carryon.train.inference.scoring.vllm_engine import Engine, VllmAnswers


class Words:
    """A tokenizer, as far as answers need one."""

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [str(row) for row in rows]


HOW: dict[str, Any] = {
    "tokenizer": Words(),
    "settings": GenerateSettings(max_new_tokens=7, temperature=0.5, top_p=0.9),
    "context_tokens": 9,
    "dtype": "float32",
}
PARENT = """
import sys, time
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.scoring.vllm_engine import VllmAnswers
how = {"settings": GenerateSettings(), "context_tokens": 9, "dtype": "float32"}
answers = VllmAnswers("m", tokenizer=None, **how)
print(answers._process.pid, flush=True)
answers([[14]], 0, ["p"])
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that stands in for vLLM; returns the folder of temporary files."""
    monkeypatch.setenv(PYTHON_VARIABLE, make_tiny_vllm(tmp_path))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return temporary


def test_each_row_has_its_seed_and_all_settings(tiny: Path) -> None:
    answers = VllmAnswers("m", **HOW)
    text = "[{}, 70, 5, 9, 0]"  # ten times seed, length, temperature, top_p, and whether it is text
    first, second = answers([[1, 2], [3]], 0, ["a", "b"])
    assert (first.text, first.num_tokens, first.is_cut) == (text.format("1, 2, 0"), 7, False)
    assert (second.text, second.num_tokens, second.is_cut) == (text.format("3, 10"), 6, True)
    with pytest.raises(EngineError, match="expected it to take a prompt, got too long"):
        answers([[1] * 10], 0, ["a"])
    assert answers([[5]], 3, ["a"])[0].text == text.format("5, 30")
    answers.close()
    assert list(tiny.iterdir()) == []
    answers.close()


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[13]], r"vLLM: did not answer, and ended with code 3: .* or --engine transformers"),
        ([[15], [15]], r"vLLM: expected 2 answers, got 1"),
    ],
)
def test_an_engine_that_fails_is_named_and_its_log_is_left(
    tiny: Path, rows: list[list[int]], match: str
) -> None:
    answers = VllmAnswers("m", **HOW)
    with pytest.raises(EngineError, match=match):
        answers(rows, 0, ["a"] * len(rows))
    [folder] = tiny.iterdir()
    assert [path.name for path in folder.iterdir()] == ["log"]
    assert "all that vLLM prints" in (folder / "log").read_text()


def test_an_engine_that_does_not_start_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="vLLM: did not start, .* RuntimeError: no such"):
        VllmAnswers("broken", **HOW)
    with pytest.raises(EngineError, match="vLLM: did not answer, and ended with code 3"):
        VllmAnswers("not to compute", **HOW)  # so that --engine auto takes transformers
    monkeypatch.setenv(PYTHON_VARIABLE, "/no/python")
    with pytest.raises(InputError, match="CARRYON_VLLM_PYTHON: expected the Python"):
        VllmAnswers("m", **HOW)


@pytest.mark.slow
def test_an_engine_that_answers_ends_with_a_killed_parent(tiny: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tiny)},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for_the_end_of(child)
    assert list(tiny.iterdir()) == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not HAS_VLLM, reason=WITHOUT_VLLM)
def test_vllm_gives_the_answers_of_transformers(tmp_path: Path) -> None:
    base = make_tiny_base(
        tmp_path / "base",
        context=512,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
    )
    problems = {"chain_sum": read_problems("chain_sum", num=5, seed=3)}

    def answer(engine: Engine) -> list[str]:
        measured = measure(
            problems,
            arms=["base"],
            base=str(base),
            settings=GenerateSettings(max_new_tokens=12),
            forward=ForwardSettings(device="cpu", compute_dtype="float32"),
            engine=engine,
            out=tmp_path / f"{engine}.jsonl",
        )
        rows = measured.answers["chain_sum"]["base"]
        return [f"{each.text} {each.tokens} {each.is_cut}" for row in rows for each in row]

    answered = answer("auto")
    assert '"model": "vllm-' in (tmp_path / "auto.jsonl").read_text()
    assert answered == answer("transformers")


def test_without_being_asked_for_a_vllm_that_does_not_start_leaves_it_to_transformers(
    tiny: Path,
    tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, shutil.which("false") or "")
    problems = {"chain_sum": read_problems("chain_sum", num=2, seed=3)}

    def score(engine: Engine) -> int:
        measured = measure(
            problems,
            arms=["base", "base+instruct:Think."],
            base=str(tiny_base_folder),
            settings=GenerateSettings(max_new_tokens=2),
            forward=ForwardSettings(device="cpu"),
            engine=engine,
            out=tiny.parent / f"{engine}.jsonl",
        )
        return sum(len(rows) for rows in measured.answers["chain_sum"].values())

    assert score("auto") == 4
    warned = [each.message for each in caplog.records if "vLLM: did not start" in each.message]
    assert len(warned) == 1  # it is started once for all arms
    assert warned[0].endswith("With --engine auto transformers answers instead")
    with pytest.raises(EngineError, match="did not start, and ended with code 1"):
        score("vllm")
