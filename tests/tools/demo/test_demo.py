"""The demo: its parts, and all of it on the real base."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import load_base
from carryon.cache.errors import InputError
from carryon.cache.format.probe import channel_relative_error
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.tools.demo import command
from carryon.tools.demo.command import answer_command, answers_won, commands
from carryon.tools.demo.corpus import (
    HELD_OUT_SEED,
    SCORED_SEED,
    TRAINING_SEED,
    count_held_out,
    make_corpus,
    make_halves,
    prepare_corpus,
    work_out,
)

FEW = ["--samples", "16", "--num", "8"]


def test_the_corpus_is_reproducible_and_its_halves_differ() -> None:
    records = make_corpus(8)
    assert records == make_corpus(8)
    assert [record["split"] for record in records] == ["train"] * 8 + ["held-out"] * 8
    questions = {record["messages"][0]["content"] for record in records}
    assert len(questions) == len(records)
    assert len({record["id"] for record in records}) == len(records)


def test_no_held_out_problem_is_trained_on() -> None:
    halves: dict[str, set[str]] = {"train": set(), "held-out": set()}
    for record in make_corpus(5000):
        halves[record["split"]].add(record["messages"][0]["content"])
    assert halves["train"].isdisjoint(halves["held-out"])
    seeds = [TRAINING_SEED, HELD_OUT_SEED, SCORED_SEED]
    assert min(later - seed for seed, later in pairwise(seeds)) >= 1_000_000


def test_too_few_held_out_problems_are_refused() -> None:
    def make(split: str, seed: int, size: int) -> Iterator[dict[str, Any]]:
        for number in range(size):
            question = {"role": "user", "content": f"question {number}"}
            answer = {"role": "assistant", "content": "yes"}
            yield {"id": f"{split}-{number}", "split": split, "messages": [question, answer]}

    assert [record["id"] for record in make_halves(make, 1, 1)] == ["train-0", "held-out-1"]
    with pytest.raises(InputError, match="expected 4 held-out problems .* got 3. Fix: fewer"):
        make_halves(make, 5, 4)


def test_an_answer_is_worked_out_in_plain_words() -> None:
    animals = {"ant": 3, "human": 1, "leech": 2, "woodlouse": 3}
    text = work_out(animals, {"ant": 6, "human": 2, "leech": 0, "woodlouse": 14})
    assert text == (
        "3 ants: 3 * 6 = 18, and 0 + 18 = 18.\n1 human: 1 * 2 = 2, and 18 + 2 = 20.\n"
        "2 leechs: 2 * 0 = 0, and 20 + 0 = 20.\n"
        "3 woodlouses: 3 * 14 = 42, and 20 + 40 = 60, 60 + 2 = 62.\n"
        "Therefore, the final answer is 62."
    )


def test_the_question_shown_is_one_that_the_carryon_won(tmp_path: Path) -> None:
    verdicts = {"long lost": (True, False), "won": (False, True), "both": (True, True)}
    lines = [{"format": 1}]
    for question, rights in verdicts.items():
        for arm, is_right in zip(("base", "carryon"), rights, strict=True):
            answer = {"question": question, "arm": arm, "is_right": is_right}
            lines.append({**answer, "text": f"{arm} to {question}"})
    stopped = {"question": "?", "arm": "base", "is_right": False, "text": ""}  # fewer now
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, [*lines, stopped])))
    texts = {"base": "base to won", "carryon": "carryon to won"}
    assert answers_won(tmp_path / "answers.jsonl") == ("won", texts)


@pytest.mark.parametrize(("samples", "held_out"), [(8, 8), (200, 10), (520, 26), (9000, 200)])
def test_the_number_of_held_out_problems(samples: int, held_out: int) -> None:
    assert count_held_out(samples) == held_out


def test_another_number_of_samples_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_corpus(tmp_path / "corpus.jsonl", 8)
    prepare_corpus(tmp_path / "corpus.jsonl", 8)
    assert main(["demo", "--out", str(tmp_path), "--samples", "9"]) == 2
    assert "expected the 9 + 8 problems of this version, got others" in capsys.readouterr().err


def test_answers_in_other_words_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_corpus(tmp_path / "corpus.jsonl", 8)
    text = (tmp_path / "corpus.jsonl").read_text()
    (tmp_path / "corpus.jsonl").write_text(text.replace("Therefore, the", "So the"))
    assert main(["demo", "--out", str(tmp_path), "--samples", "8"]) == 2
    assert "got others. Fix: give the --samples" in capsys.readouterr().err


def test_a_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "with thesis.tex. Fix: give another --out" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "got the file" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--samples", "1"]) == 2
    assert not (tmp_path / "new").exists()


def test_each_command_reads_files_of_those_before(tmp_path: Path) -> None:
    prepare_corpus(tmp_path / "corpus.jsonl", 8)
    planned = [*commands(tmp_path, num=8), answer_command(tmp_path, "How many?")]
    names = ["extract", "inspect", "train", "score", "generate"]
    assert [argv[0] for argv in planned] == names
    known = {str(tmp_path / "corpus.jsonl"), str(tmp_path / "base")}
    for argv in planned:
        paths = {word for word in argv if word.startswith(str(tmp_path))}
        made = {argv[argv.index(word) + 1] for word in ("--out", "--html") if word in argv}
        assert paths - made <= known
        known |= made | {f"{path}/carryon" for path in made}


def test_a_demo_without_a_network_says_so_in_one_line_and_keeps_the_corpus(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "carryon.tools.cli.main", "demo", "--out", str(tmp_path / "new")],
        capture_output=True,
        text=True,
        env=os.environ | offline,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("carryon demo: error: demo base: expected HuggingFaceTB/SmolLM2-135M")
    assert "Fix: " in last
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["corpus.jsonl"]


@pytest.fixture(scope="module")
def demo_folder(real_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A demo on the real base that was stopped when it had the base; answers are cut."""
    folder = tmp_path_factory.mktemp("real") / "demo"
    prepare_corpus(folder / "corpus.jsonl", 16)
    shutil.copytree(real_base, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "ANSWER_TOKENS", 24)
        assert main(["demo", "--out", str(folder), *FEW]) == 0
        yield folder


@pytest.mark.real
def test_the_demo_customizes_the_real_base(demo_folder: Path) -> None:
    for name in ("corpus.jsonl", "base/config.json", "store/zarr.json"):
        assert (demo_folder / name).is_file(), name
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "result.json"):
        assert (demo_folder / "run" / name).is_file(), name
    for name in ("answers.jsonl", "answers.html"):
        assert (demo_folder / name).is_file(), name
    result = json.loads((demo_folder / "run" / "result.json").read_text())
    # 16 problems teach little. 520 lead from 1.1 to 0.03.
    assert result["carryon_nll"] < result["base_nll"] - 0.05
    assert 0.9 < result["base_nll"] < 1.5
    weights = demo_folder / "run" / "carryon" / "carryon.safetensors"
    assert 1.3e6 < weights.stat().st_size < 1.5e6


@pytest.mark.real
def test_the_real_store_is_small_and_opens_with_plain_zarr(demo_folder: Path) -> None:
    import zarr

    store = zarr.open_group(demo_folder / "store", mode="r")
    hidden: Any = store["hidden/final"]
    tokens: Any = store["tokens"]
    assert hidden.shape == (tokens.shape[0], 576)
    assert hidden.dtype == np.uint16
    lengths: Any = store["samples/length"]
    num_tokens = int(lengths[:].sum())
    chunks = (demo_folder / "store" / "hidden" / "final" / "c").rglob("*")
    stored = sum(path.stat().st_size for path in chunks if path.is_file())
    assert stored <= 0.66 * num_tokens * 576 * 2


@pytest.mark.real
def test_stored_states_and_head_give_the_logits_of_the_real_base(demo_folder: Path) -> None:
    base = load_base(str(demo_folder / "base"), forward=ForwardSettings(device="cpu"))
    store = Store.open(demo_folder / "store")
    rows = store.read_sample(0, stop=64)
    ids = torch.from_numpy(rows.tokens.astype(np.int64))[None]
    expected = base_logits(base, ids)[0]
    states = capture(base, ["final"], ids)["final"][0].float().numpy()

    made = states @ widen(store.head().weight).T
    stored = widen(rows.hidden["final"])

    error = np.abs(made - expected.float().numpy())
    # bfloat16 keeps 8 bits: each of 576 products is off by up to 1 part in 512, at random.
    assert float(error.mean()) < 2**-8 * float(expected.float().abs().mean())
    assert (made.argmax(axis=1) == expected.argmax(dim=1).numpy()).mean() > 0.95
    # In a batch of another shape 30 blocks in bfloat16 round differently.
    assert channel_relative_error(stored, states) < 0.05


@pytest.mark.real
def test_training_needs_only_the_store(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden_base = demo_folder / "base.away"
    (demo_folder / "base").rename(hidden_base)
    try:
        argv = ["train", "--store", str(demo_folder / "store"), "--out", str(tmp_path / "run")]
        assert main([*argv, "--epochs", "1"]) == 0
    finally:
        hidden_base.rename(demo_folder / "base")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["carryon_nll"] < report["base_nll"]


@pytest.mark.real
def test_a_second_demo_resumes_the_first(
    demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(demo_folder), *FEW]) == 0
    captured = capsys.readouterr()
    output = captured.err
    assert "already there" in output
    assert " 0 computed now" in captured.err
    assert "this run is finished" in captured.err
    for name in ("extract", "inspect", "train", "score", "generate"):
        assert f"\n$ carryon {name} " in output
    assert "held-out NLL, with carry-on" in output
    assert "right of 8 unseen problems, carryon" in output
    assert "base + carry-on\n" in output
    assert json.loads(captured.out).keys() > {"seconds", "train", "answered"}
