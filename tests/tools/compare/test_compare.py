"""`carryon compare` on a tiny base: the data, every method as a row, and what rows come to."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carryon.cache.errors import InputError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.experiment_cot import experiment_cot
from carryon.tools.cli.parser import parse_call
from carryon.tools.compare.command import compare
from carryon.tools.compare.corpora import write_named_corpus
from carryon.tools.compare.data import (
    Material,
    corpus_settings,
    iter_steps,
    order_pass,
    prepare_material,
)
from carryon.tools.compare.methods import read_store
from carryon.tools.compare.report import report
from carryon.tools.compare.row import (
    ANSWER_PASSES,
    PROSE_PASSES,
    Bench,
    best_rate,
    main,
    plan_passes,
)
from carryon.tools.compare.settings import (
    CompareSettings,
    Row,
    get_methods,
    list_rows,
    row_command,
)

LAYERS = {"num_layers": 2, "width": 16}  # of the tiny base
METHODS = ["lora", "full", "bottleneck", "native-1", "top-1", "top-lora-1", "linear", "mlp"]


def make_text(path: Path) -> Path:
    """Write 24 documents of made-up words; one in the training half repeats a held-out one."""
    random = np.random.default_rng(0)
    texts = [" ".join(map(str, random.integers(0, 10**6, 40))) for _ in range(24)]
    texts[3] = texts[8]  # every eighth is held out
    path.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": x}) + "\n" for i, x in enumerate(texts))
    )
    return path


def tiny_settings(text: Path, methods: Sequence[str] = ("lora",)) -> CompareSettings:
    return CompareSettings(
        corpus=f"made-up={text}",
        methods=list(methods),
        seconds=[0.4],
        evaluate_at=[0.2],
        tokens=3000,
        held_out_tokens=600,
        window_tokens=64,
        tokens_per_step=128,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A folder with the data of a comparison."""
    root = tmp_path_factory.mktemp("compare")
    settings = tiny_settings(make_text(root / "text.jsonl"))
    prepare_material(settings, base=str(tiny_base_folder), out=root)
    return root


def material_of(work: Path, base: Path) -> Material:
    return prepare_material(tiny_settings(work / "text.jsonl"), base=str(base), out=work)


def test_no_document_is_in_both_halves_and_repeated_text_is_not_trained_on(
    work: Path, tiny_base_folder: Path
) -> None:
    material = material_of(work, tiny_base_folder)
    halves = [
        {sample.id.partition("/")[0] for sample in half}
        for half in (material.train, material.held_out)
    ]
    assert not halves[0] & halves[1]
    assert "d3" not in halves[0]
    assert material.facts["dropped_windows"] > 0
    assert material.facts["clean_overlap"] < 0.05
    assert "d8" in halves[1]


def test_windows_join_to_the_text_that_they_were_cut_from(
    work: Path, tiny_base_folder: Path
) -> None:
    lines = (work / "text.jsonl").read_text().splitlines()
    texts = {record["id"]: record["text"] for record in map(json.loads, lines)}
    pieces = map(json.loads, (work / "train.jsonl").read_text().splitlines())
    joined: dict[str, dict[int, str]] = {}
    for piece in pieces:
        name, _, number = piece["id"].partition("/")
        joined.setdefault(name, {})[int(number)] = piece["text"]
    name, parts = next((name, parts) for name, parts in joined.items() if set(parts) >= {0, 1})
    assert texts[name].startswith(parts[0] + parts[1])
    lengths = [len(sample.tokens) for sample in material_of(work, tiny_base_folder).train]
    assert 60 <= max(lengths) <= 68


def test_shorter_runs_see_the_same_samples_first() -> None:
    few, many = (order_pass(number, seed=1, epoch=0) for number in (100, 300))
    assert sorted(few) == list(range(100))
    assert sorted(many) == list(range(300))
    np.testing.assert_array_equal(few[:64], many[:64])
    assert order_pass(100, seed=2, epoch=0).tolist() != few.tolist()
    assert order_pass(100, seed=1, epoch=1).tolist() != few.tolist()


def test_steps_go_through_all_samples_again_and_again(work: Path, tiny_base_folder: Path) -> None:
    train = material_of(work, tiny_base_folder).train
    steps = iter_steps(train, 10, seed=0, tokens_per_step=128)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while not seen[2]:
        epoch, chosen = next(steps)
        assert len(chosen) == 1 or sum(len(train[i].tokens) for i in chosen) <= 128
        seen[epoch] += chosen.tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base_and_learns_until_its_budget_ends(
    method: str, work: Path, tiny_base_folder: Path, store_tmp: Path
) -> None:
    out = Path(shutil.copytree(work, store_tmp / "out"))
    (out / "rows").mkdir()
    settings = tiny_settings(work / "text.jsonl", [method])
    for run in ("first", "second") if method in ("bottleneck", "top-1") else ("first",):
        row = Row(method=method, run=run, seconds=0.4, seed=1)
        request: dict[str, Any] = {
            "settings": settings.to_dict(),
            "row": asdict(row),
            "base": str(tiny_base_folder),
            "out": str(out),
            "learning_rate": 3e-4,
            "command": row_command(settings, row, base=str(tiny_base_folder), out=str(out)),
            **LAYERS,
        }
        main(request)
        found = json.loads((out / "rows" / f"{row.name}.json").read_text())
        # bfloat16 states, and blocks that compute on them, are the base's to rounding
        assert found["base_nll"] == pytest.approx(
            BASE_NLL.setdefault("tiny", found["base_nll"]), abs=0.01
        )
        assert found["steps"] >= 1
        assert found["curve"][-1]["clock_s"] == pytest.approx(
            found["train_s"] + (found["extraction"]["seconds"] if run == "first" else 0)
        )
        assert found["nll"] != found["base_nll"]
        assert found["nll"] < found["base_nll"] + 0.1
        assert found["ship_bytes"] > 0
        if method == "bottleneck":
            assert found["extraction"]["tokens"] > 0
    assert not list((out / "work").glob(f"{method}*/zarr.json")), "stores of first runs are removed"


def test_samples_are_found_in_a_store_that_was_extracted_in_two_parts(
    work: Path, tiny_base_folder: Path, store_tmp: Path
) -> None:
    lines = (work / "train.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("all", lines), ("one", lines[:7]), ("two", lines[7:])):
        (store_tmp / f"{name}.jsonl").write_text("".join(some))

    def extracted(name: str, part: str, *, append: bool = False) -> Store:
        extract(
            base=str(tiny_base_folder),
            data=[store_tmp / f"{part}.jsonl"],
            out=store_tmp / name,
            corpus=corpus_settings(),
            store=StoreSettings(unit_tokens=256),
            forward=ForwardSettings(compute_dtype="float32"),
            append=append,
        )
        return Store.open(store_tmp / name)

    extracted("parts", "one")
    samples = material_of(work, tiny_base_folder).train
    reads = [
        read_store(store, samples, ["final"])
        for store in (extracted("whole", "all"), extracted("parts", "two", append=True))
    ]
    for chosen in ([0, 6, 7], [len(lines) - 1, 3, 8]):
        whole, parts = (read(np.array(chosen)) for read in reads)
        tokens = np.concatenate([samples[index].tokens for index in chosen])
        assert parts.tokens.tolist() == whole.tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(
            parts.states["final"].float(), whole.states["final"].float(), rtol=0.02, atol=0.02
        )


BASE_NLL: dict[str, float] = {}


def test_cheap_methods_plan_few_passes_over_prose_and_many_over_answers(
    work: Path, tiny_base_folder: Path
) -> None:
    settings = tiny_settings(work / "text.jsonl", ["bottleneck", "mlp", "top-1"])
    methods = get_methods(settings, **LAYERS)
    prose = material_of(work, tiny_base_folder)
    masked = [replace(sample, loss_mask=sample.loss_mask.copy()) for sample in prose.train]
    for sample in masked:
        sample.loss_mask[:5] = 0
    answers = replace(prose, train=masked)

    def planned(name: str, material: Material) -> float:
        return plan_passes(
            Bench(settings=settings, base="", out=work, material=material, method=methods[name])
        )

    for name in ("bottleneck", "mlp"):
        assert planned(name, prose) == PROSE_PASSES
        assert planned(name, answers) == ANSWER_PASSES
    assert planned("top-1", prose) == planned("top-1", answers) == 1
    told = replace(settings, passes=["mlp=2.5"])
    methods = get_methods(told, **LAYERS)
    assert planned("mlp", answers) == 2.5


def test_rows_are_found_again_by_the_command_that_is_printed() -> None:
    settings = CompareSettings(
        methods=["top-3", "lora"],
        seeds=[0, 4],
        learning_rates=["lora=1e-3,2e-3", "top-3=5e-4"],
        passes=["top-3=2"],
        tokens=500,
    )
    methods = get_methods(settings, num_layers=8, width=32)
    rows = list_rows(settings, methods)
    assert [row.run for row in rows[:2]] == ["sweep", "sweep"]
    assert len(rows) == 2 + 2 * 2 * (2 + 1)  # seeds, budgets, runs of top and of lora
    assert len({row.name for row in rows}) == len(rows)
    for row in rows[2:]:
        words = row_command(settings, row, base="b", out="o").split()[2:]
        again = parse_call(compare, words, prog="carryon compare")[0].kwargs["settings"]
        known = get_methods(again, num_layers=8, width=32)
        assert known[row.method] == methods[row.method]
        assert row in list_rows(again, known)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": ["lorry"]}, "method 'lorry': expected lora, full"),
        ({"methods": ["lora-3"]}, "method 'lora-3'"),
        ({"learning_rates": ["top=1e-3"]}, "expected METHOD=NUMBER for one of lora"),
        ({"learning_rates": ["lora=fast"]}, "got 'lora=fast'"),
        ({"seconds": [0.0]}, "seconds: expected more than 0"),
        ({"seeds": []}, "seeds: expected at least one"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        get_methods(CompareSettings(**({"methods": ["lora"]} | changes)), **LAYERS)


def test_the_best_rate_of_the_short_runs_is_taken() -> None:
    settings = CompareSettings(methods=["lora"], sweep_seconds=5.0)
    lora = get_methods(settings, **LAYERS)["lora"]
    done = [
        {"method": "lora", "run": "sweep", "seconds": 5.0, "learning_rate": rate, "nll": nll}
        for rate, nll in zip(lora.rates, (3.0, 2.0, 2.5, 2.6), strict=True)
    ]
    assert best_rate(lora, settings, done) == lora.rates[1]


def make_row(method: str, run: str, seed: int, nll: float, extraction_s: float) -> dict[str, Any]:
    return {
        "method": method,
        "run": run,
        "seconds": 300.0,
        "seed": seed,
        "nll": nll,
        "base_nll": 3.0,
        "curve": [
            {"clock_s": 0.0, "tokens": 0, "steps": 0, "nll": 3.0},
            {"clock_s": 100.0, "tokens": 50, "steps": 1, "nll": nll + 0.05},
            {"clock_s": 300.0, "tokens": 90, "steps": 2, "nll": nll},
        ],
        "extraction": {"seconds": extraction_s, "tokens": 50 if extraction_s else 0},
        "tokens": 90,
        "epochs": 1,
        "tokens_per_second": 0.3,
        "train_s": 300.0 - extraction_s,
        "learning_rate": 1e-3,
        "trainable_bytes": 8,
        "ship_bytes": 4,
        "peak_bytes": 16,
        "data": {"corpus": "pydoc", "train_tokens": 100, "clean_windows": 3},
    }


def test_a_target_is_met_only_if_every_seed_meets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row("lora", "first", seed, 2.5, 0.0) for seed in (0, 1)]
    rows += [make_row("top", "second", seed, nll, 60.0) for seed, nll in ((0, 2.4), (1, 2.46))]
    rows += [make_row("linear", "second", seed, 1.0, 60.0) for seed in (0, 1)]  # a control

    figures = {each["figure"]: each for each in report(tmp_path, rows)}

    second = figures["compare.pydoc.second_run.300s"]
    assert second["best"] == "top"
    assert second["seeds"] == pytest.approx([0.1, 0.04])
    assert second["mean"] == pytest.approx(0.07)
    assert second["met"] is False  # 0.04 of seed 1 is under the target of 0.05
    # seed 0 is at LoRA's 2.5 by second 100, seed 1 by second 300: 200 s on average, 100 saved
    assert figures["compare.break_even.top.300s"]["value"] == pytest.approx(0.6)
    assert "| top | second | 300 | 0 1 | 2.4300 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "pareto.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(figures)


@pytest.mark.parametrize(("epochs", "advice"), [(9, "9 times: take fewer"), (1, "lower learning")])
def test_a_run_that_ended_above_its_lowest_point_is_told_with_what_to_do(
    tmp_path: Path, epochs: int, advice: str
) -> None:
    good, bad = (make_row(name, "first", 0, 2.5, 60.0) for name in ("top", "bottleneck"))
    bad["curve"][1]["nll"], bad["epochs"] = 2.31, epochs

    report(tmp_path, [good, bad])

    table = (tmp_path / "table.md").read_text()
    assert "| 2.3100 |" in table
    [note] = [line for line in table.splitlines() if "ended" in line]
    assert "bottleneck, first run of 300 s, seed 0, ended 0.190 above where it was at 100 s" in note
    assert advice in note


def test_a_first_run_that_ends_below_lora_has_paid_for_its_extraction(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", 0, 2.5, 0.0)]
    rows += [make_row("top", "first", 0, 2.45, 60.0), make_row("top", "second", 0, 2.4, 60.0)]
    rows += [make_row("native", "first", 0, 2.55, 60.0), make_row("native", "second", 0, 2.4, 60.0)]

    figures = {each["figure"]: each for each in report(tmp_path, rows)}

    assert figures["compare.break_even.top.300s"]["value"] == 1
    assert figures["compare.break_even.native.300s"]["value"] == pytest.approx(0.3)


def test_answers_are_taught_and_counted(
    store_tmp: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    found = experiment_cot(
        base=str(tiny_base_folder),
        out=str(store_tmp / "cot"),
        task=task,
        samples=20,
        num=4,
        seeds=[0],
        epochs=1,
    )
    corpus = (store_tmp / "cot" / "corpus.jsonl").read_text().splitlines()
    questions: dict[str, set[str]] = {"train": set(), "held-out": set()}
    for record in map(json.loads, corpus):
        questions[record["split"]].add(record["messages"][0]["content"])
    assert not questions["train"] & questions["held-out"]
    assert 0 <= found[0]["value"] <= 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found[0]


def test_an_unknown_task_leaves_no_folder(tmp_path: Path, tiny_base_folder: Path) -> None:
    with pytest.raises(InputError, match="expected a task of reasoning-gym"):
        experiment_cot(base=str(tiny_base_folder), out=str(tmp_path / "cot"), task="nosuch")
    assert not (tmp_path / "cot").exists()


def test_what_seen_problems_are_worth_is_told_apart(
    store_tmp: Path, tiny_base_folder: Path
) -> None:
    [found] = experiment_cot(
        base=str(tiny_base_folder),
        out=str(store_tmp / "cot"),
        task="chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1",
        samples=60,
        num=20,
        seeds=[0],
        epochs=1,
        keep_seen=True,
    )
    corpus = (store_tmp / "cot" / "corpus.jsonl").read_text().splitlines()
    questions: dict[str, list[str]] = {"train": [], "held-out": []}
    for record in map(json.loads, corpus):
        questions[record["split"]].append(record["messages"][0]["content"])
    seen = sum(question in questions["train"] for question in questions["held-out"])
    assert len(questions["train"]) == 60
    assert found["figure"] == "cot.chain_sum.exact_with_seen"
    assert found["target"] is None
    assert found["seen_ratio"] == seen / 20 > 0
    assert 0 <= found["exact_seen"] <= 1


def test_reference_documentation_is_split_by_topic(tmp_path: Path) -> None:
    write_named_corpus("pydoc", tmp_path / "pydoc.jsonl", num_tokens=5000)
    records = [json.loads(line) for line in (tmp_path / "pydoc.jsonl").read_text().splitlines()]
    assert len({record["id"] for record in records}) == len(records) > 1
    assert 15_000 < sum(len(record["text"]) for record in records) <= 20_000


@pytest.mark.skipif(
    shutil.which("man") is None or not Path("/usr/share/man/man1").is_dir(),
    reason="this system has no manual pages",
)
def test_manual_pages_are_plain_text(tmp_path: Path) -> None:
    write_named_corpus("manpages", tmp_path / "man.jsonl", num_tokens=1000)
    records = [json.loads(line) for line in (tmp_path / "man.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        assert "\b" not in record["text"]
        assert not any(line.startswith((".SH", ".TH")) for line in record["text"].splitlines())
