"""The experiment of teachers: its loss, the join of its stores, and a run on tiny bases."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_bases import make_tiny_base
from support.tiny_runs import TINY, without_plots
from support.tiny_stores import error_of, extract_tiny, write_corpus
from torch import Tensor
from torch.nn import functional

from carryon.cache.base.lm_head import FinalNorm, Head
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.__main__ import main
from carryon.tools.bench.teacher import log_probs
from carryon.tools.bench.teacher.join import check_teacher_carryon, join_stores
from carryon.tools.bench.teacher.loss import CHUNK, backpropagate
from carryon.tools.bench.teacher.report import figures_of
from carryon.tools.bench.teacher.training import train_student
from carryon.train.config import LossSettings
from carryon.train.data.datasets import open_data
from carryon.train.losses.frozen_head import frozen_head, place_head
from carryon.train.modules.serialization import read_card
from carryon.train.trainer.trainer import train

FINAL = StoreSettings(taps=["final"], unit_tokens=64, dtype="float32")
SHAPE = ("width", "blocks", "heads", "intermediate_size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of one corpus by two bases of one tokenizer, and a carry-on of the larger one."""
    root = tmp_path_factory.mktemp("teacher")
    data = [str(write_corpus(root / "data.jsonl", num_samples=25))]
    more = [str(write_corpus(root / "more.jsonl", num_samples=3, first=25))]
    small = make_tiny_base(root / "small", dtype=torch.float32)
    large = make_tiny_base(root / "large", dtype=torch.float32, seed=1, hidden_size=32)
    extract_tiny(str(small), data, root / "student", store=FINAL)
    # Other units in another order: only ids tell which sample is which.
    its = replace(FINAL, unit_tokens=128, seed=3)
    extract_tiny(str(large), data + more, root / "its", store=its)
    with without_plots():
        train(root / "its", out=root / "run", settings=TINY)
    return root


def argv_of(folder: Path, out: Path, *more: str) -> list[str]:
    argv = ["experiment-teacher", "--store", str(folder / "student"), "--out", str(out)]
    argv += ["--teacher", str(folder / "its"), "--device", "cpu"]
    argv += ["--teacher-carryon", str(folder / "run" / "carryon")]
    for name in SHAPE:
        argv += [f"--{name.replace('_', '-')}", str(getattr(TINY.carryon, name))]
    return [*argv, "--epochs", "2", "--tokens-per-step", "40", "--learning-rate", "0.02", *more]


# Loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_gradient_are_those_of_plain_torch(
    temperature: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    num, width, vocab_size, weight = 2 * CHUNK + 7, 8, 50, 0.3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, bias = draw(vocab_size, width), draw(vocab_size)
    norm = FinalNorm(
        kind="rms", eps=1e-6, weight_offset=0.0, weight=np.ones(width, np.float32), bias=None
    )
    head = frozen_head(
        Head(weight=rows.numpy(), bias=bias.numpy(), logit_scale=0.5, softcap=softcap, norm=norm),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    start = draw(num, width).requires_grad_()
    targets = torch.randint(vocab_size, (num,), generator=generator)
    its_logits = 2 * draw(num, vocab_size)
    its_logs = its_logits.log_softmax(1)
    sums = backpropagate(
        3 * start, targets, lambda part: its_logs[part],
        head=head, weight=weight, temperature=temperature, divisor=10,
    )  # fmt: skip
    found, start.grad = start.grad, None

    logits = 0.5 * (3 * start @ rows.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    entropy = functional.cross_entropy(logits, targets, reduction="sum")
    distance = torch.kl_div(
        (logits / temperature).log_softmax(1), (its_logits / temperature).softmax(1), reduction=2
    )
    loss = (1 - weight) * entropy + weight * temperature**2 * distance
    (loss / 10).backward()  # type: ignore[no-untyped-call]
    assert sums == pytest.approx((float(entropy.detach()), float(distance.detach())), rel=1e-4)
    assert found is not None
    assert start.grad is not None
    torch.testing.assert_close(found, start.grad, rtol=1e-4, atol=1e-5)

    start.grad = None
    backpropagate(
        3 * start, targets, None, head=head, weight=weight, temperature=temperature, divisor=10
    )
    assert start.grad is not None
    assert (found - start.grad).abs().max() > 0.01  # the teacher is there


# Stores


def test_log_probabilities_are_those_of_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    student, its = Store.open(folder / "student"), Store.open(folder / "its")
    train_half = np.flatnonzero(student.sample_held_out == 0)
    joined = join_stores(student, its, train=train_half)
    assert joined.samples.tolist() != list(range(25))
    head = place_head(its, LossSettings(head_dtype="float32"), device=torch.device("cpu"))
    path = tmp_path / "bare.f16"
    nll = log_probs.write_log_probs(
        path, its, joined, train=train_half, carryon=None, alpha=0.0, head=head
    )
    file = log_probs.LogProbFile(path=path, rows=joined.rows, vocab_size=head.vocab_size)
    assert path.stat().st_size == log_probs.num_bytes(joined, head.vocab_size)
    losses = []
    for sample in train_half.tolist():
        own = student.read_sample(sample, taps=[])
        same = its.read_sample(own.id)
        at = np.flatnonzero(own.loss_mask[1:])
        expected = torch.from_numpy(same.float32("final")[at]) @ head.weight.T
        found = file.at(int(student.sample_starts[sample]) + at)
        torch.testing.assert_close(found, expected.log_softmax(1), rtol=1e-3, atol=2e-3)
        losses += (-found[range(len(at)), own.tokens[at + 1]]).tolist()
    assert len(losses) == len(joined.rows)
    assert nll == pytest.approx(np.mean(losses), abs=1e-3)


def test_stores_that_do_not_fit_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    student = Store.open(folder / "student")
    everything = np.arange(student.num_samples)

    def refusal(name: str, lines: list[dict[str, Any]]) -> str:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        extract_tiny(str(folder / "large"), [str(data)], tmp_path / name, store=FINAL)
        other = Store.open(tmp_path / name)
        return error_of(lambda: join_stores(student, other, train=everything))

    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    missing = [line for line in lines if line["id"] != "text-7"]
    assert "'text-7' is missing. Fix: extract" in refusal("missing", missing)
    changed = [line | {"text": line["text"].replace("7", "8")} for line in lines]
    assert "sample 'text-7': expected the tokens of" in refusal("changed", changed)
    for part, name in ((student.manifest.head, "vocab_size"), (student.base, "tokenizer_sha256")):
        its = Store.open(folder / "its")
        given = {"vocab_size": its.manifest.head, "tokenizer_sha256": its.base}[name]
        given[name] = "other"
        text = error_of(lambda its=its: join_stores(student, its, train=everything))
        assert f"{str(part[name])[:12]}, got other. Fix" in text


def test_a_teacher_that_has_seen_held_out_samples_is_refused(folder: Path) -> None:
    student, its = Store.open(folder / "student"), Store.open(folder / "its")
    joined = join_stores(student, its, train=np.arange(25))
    card = read_card(folder / "run" / "carryon")
    marked = np.flatnonzero(student.sample_held_out)

    def refusal(held_out: Any, **changes: Any) -> str:  # noqa: ANN401
        changed = replace(card, **changes)
        return error_of(lambda: check_teacher_carryon(changed, its, joined, held_out=held_out))

    assert refusal(marked) == ""
    first = student.sample_id(0)
    assert f"trained on 1 of them, such as '{first}'" in refusal(np.array([0]))
    other = card.split | {"stores": ["0" * 64], "samples": ["0" * 64]}
    assert "got one of another store" in refusal(marked, split=other)
    assert "expected the weights of" in refusal(marked, base=student.manifest.base)


def test_a_base_is_no_distance_from_itself(folder: Path, tmp_path: Path) -> None:
    settings = TINY.with_options(learning_rate=1e-12, epochs=1)
    data = open_data([str(folder / "student")], settings)
    store, train_half = Store.open(folder / "student"), data.split.train
    joined = join_stores(store, store, train=train_half)
    head = place_head(store, LossSettings(head_dtype="float32"), device=torch.device("cpu"))
    path = tmp_path / "itself.f16"
    log_probs.write_log_probs(
        path, store, joined, train=train_half, carryon=None, alpha=0.0, head=head
    )
    run = train_student(
        data, data.resolve(settings), head=head, weight=1.0, temperature=1.0,
        teacher=log_probs.LogProbFile(path=path, rows=joined.rows, vocab_size=head.vocab_size),
    )  # fmt: skip
    assert abs(run["evaluations"][0]["step_kl"]) < 1e-5
    assert run["evaluations"][0]["step_nll"] > 1


# Figures


def test_a_gain_is_that_of_the_worst_seed_at_its_best_step() -> None:
    nlls = {"no-teacher": (2.0, 2.1), "bare-0.5": (2.1, 2.1), "carryon-0.5": (1.9, 2.05)}
    runs = {
        (seed, arm): {"best_nll": values[seed], "last_nll": 3 * values[seed]}
        for arm, values in nlls.items()
        for seed in (0, 1)
    }
    gain, bare = figures_of(runs, weights=[0.5], seeds=[0, 1], details={})
    assert (gain.figure, bare.figure) == ("teacher.gain", "teacher.bare_gain")
    assert gain.value == pytest.approx(0.05)
    assert gain.details["values"] == pytest.approx([0.1, 0.05])
    assert gain.details["values_at_the_end"] == pytest.approx([0.3, 0.15])
    assert gain.met is True
    assert bare.value == pytest.approx(-0.1)
    assert bare.met is None
    runs[1, "carryon-0.5"] = runs[1, "no-teacher"]
    assert figures_of(runs, weights=[0.5], seeds=[0, 1], details={})[0].met is False


# A run


@pytest.mark.slow
def test_arms_are_trained_alike_and_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = argv_of(folder, out)
    assert main([*argv, "--seeds", "0"]) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["figure"] for each in figures] == ["teacher.gain", "teacher.bare_gain"]
    results = results_in(out)
    runs = [result for name, result in results.items() if name.startswith("seed-0")]
    assert len({run["last_nll"] for run in runs}) == 3  # no arm is another one
    assert {len(run["evaluations"]) for run in runs} == {2}
    kls = [run["evaluations"][-1]["step_kl"] for run in runs]
    assert sorted(kl > 0.001 for kl in kls) == [False, True, True]
    bare, own = (results[f"teachers/{name}.json"] for name in ("bare", "carryon"))
    assert own["train_nll"] < bare["train_nll"]  # its carry-on has learned

    with without_plots():
        same = train(folder / "student", out=tmp_path / "same", settings=TINY, head_dtype="float32")
    assert results["student.json"]["held_out_nll"] == pytest.approx(same.base_nll, abs=1e-5)
    alone = results["seed-0/no-teacher.json"]
    assert alone["last_nll"] == pytest.approx(same.carryon_nll, abs=2e-3)  # saved in bfloat16

    (out / "seed-0" / "carryon-0.5.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main([*argv, "--seeds", "0", "1"]) == 0
    written = {path.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert written == {"table.md", "table.json"}
    del results["table.json"]
    assert results.items() <= results_in(out).items()  # dicts of dicts compare by value
    assert len(results_in(out)["table.json"]["runs"]) == 6
    table = (out / "table.md").read_text()
    assert "| carryon-0.5" in table
    assert "| student alone" in table

    assert main([*argv, "--temperature", "2"]) == 2
    assert "temperature is 1.0 there and 2.0 here" in capsys.readouterr().err
    assert main([*argv, "--weight", "1.5"]) == 2
    assert "--weight: expected above 0 and up to 1" in capsys.readouterr().err


def results_in(out: Path) -> dict[str, Any]:
    """Return every document by its place, without times."""
    found = {}
    for path in out.rglob("*.json"):
        found[str(path.relative_to(out))] = json.loads(path.read_text())
        found[str(path.relative_to(out))].pop("seconds", None)
    return found
