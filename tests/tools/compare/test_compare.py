"""`carryon compare` on a tiny base: the data, every method as a row, and the report."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_bases import CHAT_TEMPLATE

from carryon.cache.errors import InputError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.files.documents import write_json
from carryon.cache.settings import ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.compare import report as report_module
from carryon.tools.compare.command import compare, refuse_other_rates
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
    Setup,
    best_rate,
    main,
    plan_passes,
)
from carryon.tools.compare.settings import CompareSettings, Method, Row, get_methods, list_rows

LAYERS = {"num_layers": 2, "width": 16}  # of the tiny base
METHODS = ["lora", "full", "bottleneck", "native-1", "top-1", "top-lora-1", "linear", "mlp"]


def make_text(path: Path) -> Path:
    """Write 24 documents of random words; one in the training half repeats a held-out one."""
    random = np.random.default_rng(0)
    texts = [" ".join(map(str, random.integers(0, 10**6, 40))) for _ in range(24)]
    texts[3] = texts[8]  # every eighth is held out
    path.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": x}) + "\n" for i, x in enumerate(texts))
    )
    return path


def tiny_settings(methods: Sequence[str] = ("lora",)) -> CompareSettings:
    return CompareSettings(
        methods=list(methods),
        seconds=[0.4],
        tokens=3000,
        held_out_tokens=600,
        window_tokens=64,
        tokens_per_step=128,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """A folder with the data of a comparison."""
    root = tmp_path_factory.mktemp("compare")
    data = [str(make_text(root / "text.jsonl"))]
    prepare_material(tiny_settings(), base=str(tiny_base_folder), out=root, data=data)
    return root


def material_of(work: Path, base: Path) -> Material:
    return prepare_material(tiny_settings(), base=str(base), out=work)


# Data


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
    assert material.facts["dropped_train"] > 0
    assert material.facts["shared_ratio"] < 0.05
    assert "d8" in halves[1]


@pytest.mark.parametrize("is_marked", [False, True])
def test_records_of_a_split_group_are_in_one_half(
    tmp_path: Path, tiny_base_folder: Path, is_marked: bool
) -> None:
    data = make_text(tmp_path / "text.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split_group"] = number % 6
    if is_marked:
        rows[13]["split"] = "held-out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    material = prepare_material(
        tiny_settings(), base=str(tiny_base_folder), out=tmp_path, data=[str(data)]
    )
    held_out = {sample.id.partition("/")[0] for sample in material.held_out}
    trained = {sample.id.partition("/")[0] for sample in material.train}
    assert held_out <= {f"d{number}" for number in range(is_marked, 24, 6)}
    assert len(held_out) > 1
    assert trained.isdisjoint({f"d{number}" for number in range(is_marked, 24, 6)})


def test_a_short_answer_that_is_held_out_is_not_trained_on(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    """Even if it is too short for a run of 32 tokens, and not marked."""
    records = [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(24)]
    records[3] = records[8]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    material = prepare_material(
        tiny_settings(),
        base=str(tiny_base_folder),
        out=tmp_path,
        data=[str(tmp_path / "text.jsonl")],
    )
    halves = [
        {sample.tokens.tobytes() for sample in half} for half in (material.train, material.held_out)
    ]
    assert not halves[0] & halves[1]
    assert (len(halves[0]), material.facts["dropped_train"]) == (20, 1)


def chat(number: int, **first: Any) -> dict[str, Any]:  # noqa: ANN401
    """Two turns of words that no other chat has; `first` are fields of the first answer."""
    random = np.random.default_rng(number)
    texts = [" ".join(map(str, random.integers(0, 10**6, 3))) for _ in range(4)]
    roles = ["user", "assistant"] * 2
    messages = [{"role": x, "content": text} for x, text in zip(roles, texts, strict=True)]
    messages[1] |= first
    return {"messages": messages}


def material_of_rows(rows: list[dict[str, Any]], root: Path, base: Path) -> Material:
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare_material(
        tiny_settings(), base=str(base), out=root, data=[str(root / "rows.jsonl")]
    )


def test_chats_keep_their_weights(tmp_path: Path, tiny_base_folder: Path) -> None:
    folders = [tmp_path / "all", tmp_path / "last"]
    targets = []
    for folder, second in zip(folders, ({}, {"weight": 0}), strict=True):
        folder.mkdir()
        rows = [chat(number, **second) for number in range(24)]
        material = material_of_rows(rows, folder, tiny_base_folder)
        assert len(material.train_lines(range(3)).splitlines()) == 3
        targets.append({sample.id[-2:]: int(sample.loss_mask.sum()) for sample in material.train})
    lines = (folders[1] / "train.jsonl").read_text().splitlines()
    assert all(json.loads(line)["messages"][1]["weight"] == 0 for line in lines)
    assert sum(targets[1].values()) < sum(targets[0].values())


def test_preference_pairs_are_refused(tmp_path: Path, tiny_base_folder: Path) -> None:
    rows = [{"prompt": f"{n} is", "chosen": " the", "rejected": " an"} for n in range(24)]
    with pytest.raises(InputError, match="rows.jsonl:2: expected chats, .* got a preference pair"):
        material_of_rows(rows, tmp_path, tiny_base_folder)


def test_a_record_that_becomes_several_samples_is_refused(
    tmp_path: Path, tiny_base_folder: Path
) -> None:
    base = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    text = "{{ message['content'] }}"
    note = "{{ '(sure) ' if loop.last and message['role'] == 'assistant' else '' }}"
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(text, note + text))
    with pytest.raises(InputError, match="expected one sample a record, got .*@1 and .*@3"):
        material_of_rows([chat(number) for number in range(24)], tmp_path, base)


def test_a_marked_half_is_held_out(tmp_path: Path, tiny_base_folder: Path) -> None:
    lines = make_text(tmp_path / "text.jsonl").read_text().splitlines()
    marked = [
        json.loads(line) | ({"split": "held-out"} if i < 5 else {}) for i, line in enumerate(lines)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(each) + "\n" for each in marked))
    material = prepare_material(
        tiny_settings(),
        base=str(tiny_base_folder),
        out=tmp_path,
        data=[str(tmp_path / "text.jsonl")],
    )
    assert {sample.id.partition("/")[0] for sample in material.held_out} <= {
        *("d0", "d1", "d2", "d3", "d4")
    }


def test_windows_join_to_the_text_that_they_were_cut_from(
    work: Path, tiny_base_folder: Path
) -> None:
    lines = (work / "text.jsonl").read_text().splitlines()
    texts = {record["id"]: record["text"] for record in map(json.loads, lines)}
    windows = map(json.loads, (work / "train.jsonl").read_text().splitlines())
    joined: dict[str, dict[int, str]] = {}
    for window in windows:
        name, _, number = window["id"].partition("/")
        joined.setdefault(name, {})[int(number)] = window["text"]
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


def test_steps_go_through_all_samples_repeatedly(work: Path, tiny_base_folder: Path) -> None:
    train = material_of(work, tiny_base_folder).train
    steps = iter_steps(train, 10, seed=0, tokens_per_step=128)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while not seen[2]:
        epoch, chosen = next(steps)
        assert len(chosen) == 1 or sum(len(train[i].tokens) for i in chosen) <= 128
        seen[epoch] += chosen.tolist()
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))


def test_another_base_or_other_data_are_refused(work: Path, tiny_base_folder: Path) -> None:
    (work / "base.json").write_text(json.dumps({"source": str(tiny_base_folder), **LAYERS}))
    words = {"out": str(work), "settings": tiny_settings()}
    with pytest.raises(InputError, match="expected the base .*, got other. Fix: another --out"):
        compare(base="other", data=[str(work / "text.jsonl")], **words)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected data \[.*\], as in its first run, got"):
        compare(base=str(tiny_base_folder), data=["x.jsonl"], **words)  # type: ignore[arg-type]


# Rows


BASE_NLL: dict[str, float] = {}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_as_the_base_and_learns_until_its_budget_ends(
    method: str, work: Path, tiny_base_folder: Path, store_tmp: Path
) -> None:
    out = Path(shutil.copytree(work, store_tmp / "out"))
    (out / "rows").mkdir()
    settings = tiny_settings([method])
    for run in ("first", "second") if method in ("bottleneck", "top-1") else ("first",):
        row = Row(method=method, run=run, seconds=0.4, seed=1)
        request: dict[str, Any] = {
            "settings": settings.to_dict(),
            "row": asdict(row),
            "base": str(tiny_base_folder),
            "out": str(out),
            "learning_rate": 3e-4,
            **LAYERS,
        }
        main(request)
        result = json.loads((out / "rows" / f"{row.name}.json").read_text())
        # bfloat16 states, and blocks that compute on them, are the base's to rounding
        assert result["base_nll"] == pytest.approx(
            BASE_NLL.setdefault("tiny", result["base_nll"]), abs=0.01
        )
        assert result["steps"] >= 1
        assert result["curve"][-1]["clock_s"] == pytest.approx(
            result["train_s"] + (result["extraction"]["seconds"] if run == "first" else 0)
        )
        assert result["nll"] != result["base_nll"]
        assert result["nll"] < result["base_nll"] + 0.1
        assert result["ship_bytes"] > 0
        assert result["core"]
        if method == "bottleneck":
            assert result["extraction"]["tokens"] > 0
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


def test_cheap_methods_plan_few_passes_over_prose_and_many_over_answers(
    work: Path, tiny_base_folder: Path
) -> None:
    settings = tiny_settings(["bottleneck", "mlp", "top-1"])
    methods = get_methods(settings, **LAYERS)
    prose = material_of(work, tiny_base_folder)
    masked = [replace(sample, loss_mask=sample.loss_mask.copy()) for sample in prose.train]
    for sample in masked:
        sample.loss_mask[:5] = 0
    answers = replace(prose, train=masked)

    def planned(name: str, material: Material) -> float:
        return plan_passes(
            Setup(settings=settings, base="", out=work, material=material, method=methods[name])
        )

    for name in ("bottleneck", "mlp"):
        assert planned(name, prose) == PROSE_PASSES
        assert planned(name, answers) == ANSWER_PASSES
    assert planned("top-1", prose) == planned("top-1", answers) == 1


def test_rows_are_sweeps_first_then_seeds_with_names_of_their_own() -> None:
    settings = CompareSettings(
        methods=["top-3", "lora"],
        seeds=[0, 4],
        learning_rates=["lora=1e-3,2e-3", "top-3=5e-4"],
        tokens=500,
    )
    methods = get_methods(settings, num_layers=8, width=32)
    assert methods["top-3"].rates == (5e-4,)
    rows = list_rows(settings, methods)
    assert [row.run for row in rows[:2]] == ["sweep", "sweep"]
    assert len(rows) == 2 + 2 * 2 * (2 + 1)  # seeds, budgets, runs of top and of lora
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [({}, 150), ({"seconds": [20.0, 10.0]}, 10), ({"seconds": [20.0], "sweep_seconds": 3.0}, 3)],
)
def test_sweeps_take_the_shortest_budget_unless_another_is_given(
    changes: dict[str, Any], seconds: float
) -> None:
    settings = CompareSettings(**({"methods": ["lora"]} | changes))
    rows = list_rows(settings, get_methods(settings, **LAYERS))
    assert {row.seconds for row in rows if row.run == "sweep"} == {seconds}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"methods": ["lorry"]}, "method 'lorry': expected lora, full"),
        ({"methods": ["lora-3"]}, "method 'lora-3'"),
        ({"learning_rates": ["top=1e-3"]}, "expected METHOD=RATE for one of lora"),
        ({"learning_rates": ["lora=fast"]}, "got 'lora=fast'"),
        ({"seconds": [0.0]}, "seconds: expected more than 0"),
        ({"seeds": []}, "seeds: expected at least 1"),
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


# The report


def make_row(
    method: str, run: str, seed: int, nll: float, extraction_s: float, *, seconds: float = 300.0
) -> dict[str, Any]:
    return {
        "method": method,
        "run": run,
        "seconds": seconds,
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
        "ship_bytes": 4,
        "peak_bytes": 16,
        "data": {"train_tokens": 100, "held_out_targets": 3000},
    }


def read_report(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Make the report and return its lines."""
    report(folder, rows)
    return (folder / "report.md").read_text().splitlines()


def test_the_report_begins_with_the_method_to_take(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", 0, 2.5, 0.0), make_row("linear", "first", 0, 2.0, 9.0)]
    rows += [make_row("bottleneck", "first", 0, 2.4, 60.0), make_row("top", "second", 0, 2.3, 90.0)]

    assert read_report(tmp_path, rows)[:4] == [
        "Base alone: 3.0000 nats per token, on 3,000 held-out targets. Lower is better.",
        "In 300 s from text take bottleneck: 2.4000, 0.1000 below lora. One seed: --seeds 0 1 2 "
        "shows the noise.",
        "In 300 s with a finished store take top: 2.3000; its extraction takes 90 s, once.",
        "",
    ]


def test_the_report_says_when_seeds_differ_as_much_as_methods(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", seed, nll, 0.0) for seed, nll in ((0, 2.4), (1, 2.6))]
    rows += [make_row("top", "first", seed, nll, 9.0) for seed, nll in ((0, 2.45), (1, 2.5))]
    lines = read_report(tmp_path, rows)
    assert lines[1].endswith(
        "take top: 2.4750, 0.0250 below lora. The seeds differ as much: take either."
    )


def test_the_report_says_when_nothing_improves_on_the_base(tmp_path: Path) -> None:
    lines = read_report(tmp_path, [make_row("lora", "first", 0, 3.1, 0.0)])
    assert lines[1] == "In 300 s from text, no method improves on the base: give more time."


def test_a_report_of_second_runs_alone_says_nothing_of_first_ones(tmp_path: Path) -> None:
    lines = read_report(tmp_path, [make_row("top", "second", 0, 2.3, 90.0)])
    assert lines[1].startswith("In 300 s with a finished store take top: 2.3000")


def test_other_rates_than_those_of_finished_runs_are_refused(tmp_path: Path) -> None:
    methods = {"lora": Method(name="lora", rates=(4e-3,))}
    rows = [Row(method="lora", run="first", seconds=300.0, seed=seed) for seed in (0, 1)]
    (tmp_path / "rows").mkdir()
    write_json(tmp_path / "rows" / f"{rows[0].name}.json", make_row("lora", "first", 0, 2.0, 0.0))
    with pytest.raises(InputError, match=r"learning rate of 0.004, got one at 0.001. Fix: another"):
        refuse_other_rates(tmp_path, rows, methods)
    refuse_other_rates(tmp_path, rows, {"lora": replace(methods["lora"], rates=(1e-3, 4e-3))})


def test_the_table_has_the_best_method_of_each_budget_first(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", 0, 2.5, 0.0), make_row("top", "first", 0, 2.4, 60.0)]
    rows += [make_row("lora", "first", 0, 2.7, 0.0, seconds=20.0)]
    table = [line for line in read_report(tmp_path, rows) if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:5]] for line in table[2:]]
    assert cells == [
        ["lora", "20", "none", "2.7000"],
        ["top", "300", "in this time", "2.4000"],
        ["lora", "300", "none", "2.5000"],
    ]


def test_a_figure_counts_the_worst_seed(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", seed, 2.5, 0.0) for seed in (0, 1)]
    rows += [make_row("top", "second", seed, nll, 60.0) for seed, nll in ((0, 2.4), (1, 2.46))]
    rows += [make_row("linear", "second", seed, 1.0, 60.0) for seed in (0, 1)]  # a control

    figures = {figure.figure: figure for figure in report(tmp_path, rows)}

    second = figures["compare.second_run.300s"]
    assert second.details["best"] == "top"
    assert second.details["seeds"] == pytest.approx([0.1, 0.04])
    assert second.value == pytest.approx(0.04)
    # seed 0 is at LoRA's 2.5 by second 100, seed 1 by second 300: 200 s on average, 100 saved
    assert figures["compare.break_even.top.300s"].value == pytest.approx(0.6)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "pareto.png").stat().st_size > 1000
    assert len((tmp_path / "figures.jsonl").read_text().splitlines()) == len(figures)


@pytest.mark.parametrize(("budgets", "num_panels"), [([300.0], 1), ([100.0, 300.0], 2)])
def test_losses_are_drawn_against_seconds_only_if_these_differ(
    budgets: list[float], num_panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, int] = {}

    def count(path: Path, *panels: object, **options: object) -> bool:
        drawn[path.name] = len(panels)
        return True

    monkeypatch.setattr(report_module, "draw", count)
    report(tmp_path, [make_row("lora", "first", 0, 2.5, 0.0, seconds=each) for each in budgets])
    assert drawn == {"curves.png": 2, "pareto.png": num_panels}


@pytest.mark.parametrize(
    ("epochs", "advice"), [(9, "9 times: give more text"), (1, "lower learning")]
)
def test_a_run_that_ended_above_its_lowest_loss_is_noted_with_advice(
    tmp_path: Path, epochs: int, advice: str
) -> None:
    good, bad = (make_row(name, "first", 0, 2.5, 60.0) for name in ("top", "bottleneck"))
    bad["curve"][1]["nll"], bad["epochs"] = 2.31, epochs

    [note] = [line for line in read_report(tmp_path, [good, bad]) if "ended" in line]

    assert "bottleneck, first run of 300 s, seed 0, ended 0.190 above its loss at 100 s" in note
    assert advice in note


def test_a_first_run_that_ends_below_lora_has_paid_for_its_extraction(tmp_path: Path) -> None:
    rows = [make_row("lora", "first", 0, 2.5, 0.0)]
    rows += [make_row("top", "first", 0, 2.45, 60.0), make_row("top", "second", 0, 2.4, 60.0)]
    rows += [make_row("native", "first", 0, 2.55, 60.0), make_row("native", "second", 0, 2.4, 60.0)]

    figures = {figure.figure: figure.value for figure in report(tmp_path, rows)}

    assert figures["compare.break_even.top.300s"] == 1
    assert figures["compare.break_even.native.300s"] == pytest.approx(0.3)
