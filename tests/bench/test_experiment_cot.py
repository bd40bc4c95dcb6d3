"""The experiment of chains of thought: texts, steps, controls, counts, and a run on a tiny base."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import torch
from support.tiny_bases import make_tiny_base

from carryon.cache.base.model import load_base
from carryon.cache.errors import DamagedFileError, InputError, NothingRightError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench import planned
from carryon.tools.bench.__main__ import main
from carryon.tools.bench.accuracy import chains, experiment, plan, recipes, rows
from carryon.tools.bench.accuracy.corpus import make_corpus
from carryon.tools.bench.accuracy.lora import train_lora
from carryon.tools.bench.accuracy.mlp import build_mlp, train_mlp
from carryon.tools.bench.accuracy.report import write_report
from carryon.tools.bench.accuracy.templates import is_unseen_template, make_problems
from carryon.tools.bench.planned import check_steps
from carryon.tools.cli.program import Program
from carryon.tools.improve import steps
from carryon.train.config import CarryOnSettings, TrainSettings
from carryon.train.inference.scoring.comparison import Paired
from carryon.train.inference.scoring.problems import Problem, read_problems
from carryon.train.inference.scoring.rules import parse_rule
from carryon.train.modules.packed_attention import pack
from carryon.train.modules.serialization import load_carryon

LEGS = "leg_counting:min_animals=2,max_animals=3"
CPU = ForwardSettings(device="cpu", compute_dtype="float32")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Texts


def solve(expression: str) -> str:
    problem = Problem(
        id="p", question="", answer="", rule=parse_rule("end"), metadata={"expression": expression}
    )
    return chains.work_out(problem)


@pytest.mark.parametrize(
    ("expression", "lines"),
    [
        ("4 - 1 - 7", ["4 - 1 = 3", "3 - 7 = -4"]),
        ("2 + 3 * 4", ["3 * 4 = 12", "2 + 12 = 14"]),
        ("8 - -3", ["8 - (-3) = 11"]),
        ("-( 2 + 5 ) * 3", ["2 + 5 = 7", "-7 * 3 = -21"]),
        ("-7 / 2", ["-7 / 2 = -4"]),
        ("6", []),
    ],
)
def test_a_formula_is_worked_out_operation_by_operation(expression: str, lines: list[str]) -> None:
    result = eval(expression.replace("/", "//"))  # noqa: S307 -- of the table above
    assert solve(expression) == "\n".join([*lines, f"Therefore, the final answer is {result}."])


def test_what_is_no_formula_of_whole_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="formula: expected whole numbers"):
        solve("__import__('os')")


@pytest.mark.parametrize("wording", chains.WRITERS)
def test_chains_are_right_and_end_in_plain_words(wording: str) -> None:
    name = wording.partition("-")[0]
    for problem in read_problems(LEGS if name == "leg_counting" else name, num=60, seed=7):
        text = chains.write_chain(problem, wording=wording)
        assert problem.is_right(text)
        end = re.search(r"\nTherefore, the final answer is (-?[\d.]+)\.$", f"\n{text}")
        assert end
        assert float(end[1]) == float(problem.answer)
        assert "####" not in text


def test_legs_are_counted_line_by_line_and_then_added() -> None:
    animals = {"human": 1, "ant": 3, "woodlouse": 2}
    problem = Problem(
        id="p", question="", answer="", rule=parse_rule("end"), metadata={"animals": animals}
    )
    assert chains.write_chain(problem, wording="leg_counting").splitlines() == [
        "1 human has 2 legs: 1 * 2 = 2",
        "3 ants have 6 legs: 3 * 6 = 18",
        "2 woodlouses have 14 legs: 2 * 14 = 28",
        "2 + 18 = 20",
        "20 + 28 = 48",
        "Therefore, the final answer is 48.",
    ]
    assert chains.write_chain(problem, wording="leg_counting-steps").splitlines() == [
        "1 human: 1 * 2 = 2, and 0 + 2 = 2.",
        "3 ants: 3 * 6 = 18, and 2 + 10 = 12, 12 + 8 = 20.",
        "2 woodlouses: 2 * 14 = 28, and 20 + 20 = 40, 40 + 8 = 48.",
        "Therefore, the final answer is 48.",
    ]


def test_a_corpus_has_no_question_of_the_test(tmp_path: Path) -> None:
    # One digit: many questions are equal, within training and between training and test
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    counts = make_corpus(task=task, out=str(tmp_path / "c.jsonl"), samples=150, test_num=60)
    questions = [each["messages"][0]["content"] for each in read_lines(tmp_path / "c.jsonl")]
    tested = {problem.question for problem in read_problems(task, num=60, seed=1_000_001)}
    assert counts["kept"] == len(questions) == len(set(questions)) == 150 - counts["equal"]
    assert counts["equal"] > 0
    assert tested.isdisjoint(questions)
    assert tested & {problem.question for problem in read_problems(task, num=150, seed=1)}


def test_held_out_texts_are_marked_as_many_as_told(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    facts = make_corpus(task=LEGS, out=str(out), samples=40, held_out_ratio=0.3)
    records = read_lines(out)
    assert 0 < facts["held_out"] < facts["kept"]
    assert sum(record.get("split") == "held-out" for record in records) == facts["held_out"]


def test_wrong_chains_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(problem: Problem) -> str:
        return chains.work_out(problem) if problem.id.endswith("2") else "It is 1,000,001."

    monkeypatch.setitem(chains.WRITERS, "chain_sum", write)
    out = tmp_path / "c.jsonl"
    counts = make_corpus(task="chain_sum", out=str(out), samples=20, test_num=1)
    assert (counts["kept"], counts["wrong"]) == (2, 18)
    assert all(each["sampled"]["problem"].endswith("2") for each in read_lines(out))
    monkeypatch.setitem(chains.WRITERS, "chain_sum", lambda _: "It is 1,000,001.")
    with pytest.raises(InputError, match="chain is right .* got none of 20"):
        make_corpus(task="chain_sum", out=str(out), samples=20, test_num=1)


def test_templates_are_for_training_for_its_held_out_half_or_for_the_test(tmp_path: Path) -> None:
    problems, test, corpus = (tmp_path / f"{name}.jsonl" for name in ("problems", "test", "corpus"))
    facts = make_problems(
        task="gsm_symbolic", out=str(problems), test_out=str(test), samples=80, test_num=20
    )
    assert (facts["problems"], facts["test_problems"]) == (80, 20)
    wording = "gsm_symbolic"
    make_corpus(task=str(problems), out=str(corpus), wording=wording, held_out_ratio=0.2)
    records = read_lines(corpus)
    assert len(records) == 80

    def templates(ids: list[str], *, seed: int, size: int) -> set[int]:
        made = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
        return {made.task_indices[int(each.rpartition("-")[2])] for each in ids}

    halves = {"train": list[str](), "held-out": list[str]()}
    for record in records:
        halves[record.get("split", "train")].append(record["sampled"]["problem"])
    trained, held_out = (templates(ids, seed=1, size=160) for ids in halves.values())
    unseen = templates([each["id"] for each in read_lines(test)], seed=1_000_001, size=200)
    assert all((trained, held_out, unseen))
    assert trained.isdisjoint(held_out)
    assert unseen.isdisjoint(trained | held_out)
    assert all(map(is_unseen_template, unseen))
    assert sum(map(is_unseen_template, range(100))) == 20
    assert len({each["split_group"] for each in records}) == len(trained | held_out)
    assert len(read_problems(str(test), num=20, seed=0)) == 20
    with pytest.raises(InputError, match="--task: expected gsm_symbolic, got 'chain_sum'"):
        make_problems(task="chain_sum", out=str(problems), test_out=str(test))


# Steps


def make_experiment(root: Path, **changes: Any) -> plan.Experiment:  # noqa: ANN401
    given = plan.Experiment(
        root=root,
        base="base",
        num_layers=30,
        seeds=[0, 1],
        num=200,
        kinds=["bottleneck"],
        has_lora=True,
        shots=4,
        rule="auto",
        tokens_per_step=384,
        learning_rate=2e-3,
        lora_rates=[2e-3],
        sampled_softmax=2048,
        temperature=0.8,
        engine="auto",
        batch_rows=16,
        chat_template_kwargs=[],
    )
    return replace(given, **changes)


def test_the_steps_of_a_task_in_order(tmp_path: Path) -> None:
    own = plan.plan_task(make_experiment(tmp_path), recipes.RECIPES["chain_sum"])
    names = [str(each.result.relative_to(tmp_path / "chain_sum")) for each in own.steps()]
    assert names == [
        "examples.json",
        "corpus.json",
        "hinted.json",
        "extract.json",
        *(f"seed-0/{name}.json" for name in ("bottleneck", "lora", "score-bottleneck-lora")),
        *(f"seed-1/{name}.json" for name in ("bottleneck", "lora", "score-bottleneck-lora")),
    ]
    assert own.labels == ["base", "instruct", "few-shot", "bottleneck", "lora"]
    assert own.examples
    assert own.hinted
    for sample in (own.examples.argv, own.corpus.argv, own.hinted.argv):
        assert sample[0] == "sample"
        assert "--keep-instruction" not in sample  # the instruction is not stored
        assert sample[sample.index("--test-seed") + 1] == "1000001"
        assert sample[sample.index("--task-seed") + 1] == "1"
    assert "--instruction Think step by step." in " ".join(own.examples.argv)
    words = " ".join(own.corpus.argv)
    examples = own.examples.argv[own.examples.argv.index("--out") + 1]
    shown, hinted = (str(tmp_path / f"chain_sum/{name}.jsonl") for name in ("shown", "hinted"))
    assert f"--shots 4 --examples {examples} --example-sets 8 --examples-out {shown}" in words
    assert "--instruction" not in words
    corpus = own.corpus.argv[own.corpus.argv.index("--out") + 1]
    told = " ".join(own.hinted.argv)
    assert f"--known {corpus} --unsolved --hint The answer is {{answer}}." in told
    assert f"--shots 4 --examples {shown}" in told
    assert "--temperature 0 " in told
    assert str(own.hinted.may_lack) == hinted
    assert f"--data {corpus} {hinted} --out" in " ".join(own.extract.argv)
    for score in own.scores.values():  # the prompt that made the texts is the one to compare with
        assert score.argv[score.argv.index("--examples") + 1] == shown
    at = own.extract.argv.index("--taps")
    assert own.extract.argv[at + 1 : at + 4] == ["final", "layer.20", "layer.10"]


def test_more_shots_than_made_the_texts_are_drawn_from_these(tmp_path: Path) -> None:
    given = make_experiment(tmp_path, shots=5)
    for name, answers in (("chain_sum", "corpus"), ("gsm_symbolic-own-templates", "corpus")):
        own = plan.plan_task(given, recipes.RECIPES[name])
        path = str(tmp_path / name / f"{answers}.jsonl")
        for score in own.scores.values():
            assert score.argv[score.argv.index("--examples") + 1] == path
    assert own.hinted
    assert own.hinted.argv[own.hinted.argv.index("--examples") + 1] == path


STEPS = '''
from carryon.cache.errors import NothingRightError

def find(*, kept: int) -> dict:
    """Find answers.

    Args:
        kept: How many.
    """
    if not kept:
        raise NothingRightError("none")
    return {"kept": kept}

def join(*, data: list[str], out: str) -> list[str]:
    """Join data.

    Args:
        data: Files.
        out: File.
    """
    return data
'''


@pytest.mark.parametrize("kept", [0, 1])
def test_later_steps_go_without_the_file_of_a_sampling_that_found_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    (tmp_path / "made_steps.py").write_text(STEPS)
    monkeypatch.syspath_prepend(tmp_path)
    commands = {"find": "made_steps:find", "join": "made_steps:join"}
    own = Program(prog="steps", about="", closing="", commands=commands)
    found, lacking = tmp_path / "out" / "told.jsonl", tmp_path / "out" / "told.json"
    finding = planned.Planned(result=lacking, argv=["find", "--kept", str(kept)], may_lack=found)
    joining = planned.Planned(
        result=tmp_path / "out" / "join.json",
        argv=["join", "--data", "a", str(found), "--out", "b"],
    )
    found.parent.mkdir()
    expected = ["a", str(found)][: 1 + kept]
    for _ in range(2):  # run, then resumed
        done = planned.run_steps([finding, joining], own=own)
        assert done[joining.result].result == expected
    if not kept:
        must = replace(finding, result=tmp_path / "out" / "must.json", may_lack=None)
        with pytest.raises(NothingRightError):
            planned.run_steps([must], own=own)


@pytest.mark.parametrize("name", ["gsm_symbolic-templates", "gsm_symbolic-own-templates"])
def test_templates_are_held_out_before_any_text_is_made(tmp_path: Path, name: str) -> None:
    own = plan.plan_task(make_experiment(tmp_path), recipes.RECIPES[name])
    folder = tmp_path / name
    problems, corpus, *_ = own.steps()
    assert problems.result == folder / "problems.json"
    assert {str(folder / "problems.jsonl"), str(folder / "test.jsonl")} <= set(problems.argv)
    assert str(folder / "problems.jsonl") in corpus.argv
    assert corpus.argv[corpus.argv.index("--held-out-ratio") + 1] == "0.1"
    for score in own.scores.values():
        assert score.argv[score.argv.index("--tasks") + 1] == str(folder / "test.jsonl")


def test_models_are_trained_with_the_seeds_of_their_folders(tmp_path: Path) -> None:
    [recipe] = recipes.choose_recipes(["leg_counting"])
    experiment_ = make_experiment(tmp_path, kinds=["bottleneck", "mlp", "top"], seeds=[3, 5])
    for (seed, kind), step in plan.plan_task(experiment_, recipe).models.items():
        assert step.argv[step.argv.index("--seed") + 1] == str(seed)
        assert step.result.parent.name == f"seed-{seed}"
        if kind != plan.LORA:  # which has the clock
            epochs = {"top": "3"}.get(kind, "12")  # as the recipe says, or a quarter
            assert step.argv[step.argv.index("--epochs") + 1] == epochs


def test_every_step_of_every_recipe_is_a_command_that_parses(tmp_path: Path) -> None:
    given = make_experiment(tmp_path, kinds=["bottleneck", "mlp", "top"], forward=CPU)
    for recipe in recipes.RECIPES.values():
        own = plan.plan_task(given, recipe)
        results = [each.result for each in own.steps()]
        assert len(set(results)) == len(results)
        check_steps(own.steps(), own=experiment.OWN_STEPS)
        words = " ".join(own.corpus.argv)
        limits = f"--max-samples {recipe.max_answers} --form-ratio {recipe.form_ratio:g}"
        assert (limits in words) == (recipe.source == "own")
        assert ("--instruction" in words) == (recipe.source == "own" and not recipe.shown)
        assert {"--with-blocks", "layer.22"} <= set(own.extract.argv)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kinds": []}, "--kinds: expected one or more"),
        ({"kinds": ["native"]}, "--kinds: expected some of bottleneck, mlp, top, got 'native'"),
        ({"kinds": ["top"]}, "--kinds: expected another kind before top with --lora"),
        ({"seeds": [1, 1]}, "--seeds: expected one or more, each once, got '1 1'"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        make_experiment(tmp_path, **changes)


def test_recipes_are_chosen_with_settings_of_their_own() -> None:
    [one] = recipes.choose_recipes(["leg_counting:max_animals=3"], samples=9, max_new_tokens=8)
    assert (one.name, one.task) == ("leg_counting-max_animals-3", "leg_counting:max_animals=3")
    assert (one.samples, one.max_new_tokens, one.epochs, one.goal) == (9, 8, 12, None)
    assert [each.epochs for each in recipes.choose_recipes(["leg_counting"], epochs=3)] == [3]
    with pytest.raises(InputError, match="--tasks: expected some of leg_counting, .*'nosuch'"):
        recipes.choose_recipes(["nosuch"])
    with pytest.raises(InputError, match="--tasks: expected each once, got chain_sum twice"):
        recipes.choose_recipes(["chain_sum", "chain_sum"])


# Controls


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with room for worked problems."""
    return make_tiny_base(
        tmp_path_factory.mktemp("bases") / "long", context=1024, max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def store(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a few worked problems."""
    folder = tmp_path_factory.mktemp("cot")
    make_corpus(task=LEGS, out=str(folder / "c.jsonl"), samples=10, held_out_ratio=0.3)
    base = load_base(str(base_folder), forward=CPU)
    taps = ["final", "layer.1"]
    extract(base=base, data=[folder / "c.jsonl"], out=folder / "store", taps=taps)
    return folder / "store"


def test_an_mlp_sees_one_token_at_a_time_and_is_read_as_a_bottleneck(
    store: Path, tmp_path: Path
) -> None:
    settings = TrainSettings.from_options(
        taps=["final", "layer.1"], width=8, heads=2, intermediate_size=8, blocks=2, epochs=1,
        tokens_per_step=400, device="cpu", saved_dtype="float32",
    )  # fmt: skip
    result = train_mlp(store=str(store), out=str(tmp_path / "run"), settings=settings)
    module, card = load_carryon(result["readable"])
    assert card.settings["kind"] == "bottleneck"
    original, _ = load_carryon(result["carryon"])
    states = {tap: torch.randn(6, 16) for tap in ("final", "layer.1")}
    positions, packing = torch.arange(6), pack(torch.tensor([6]))
    with torch.no_grad():
        deltas = [each.correct_packed(states, packing, positions) for each in (module, original)]
        torch.testing.assert_close(deltas[0], deltas[1])
        assert deltas[0].abs().max() > 0
        states["final"][0] += 1.0
        changed = module.correct_packed(states, packing, positions)
    assert not torch.equal(changed[0], deltas[0][0])
    assert torch.equal(changed[1:], deltas[0][1:])
    assert result["num_parameters"] < sum(weight.numel() for weight in module.parameters())


def test_an_mlp_starts_as_the_base() -> None:
    settings = CarryOnSettings(kind="bottleneck", width=8, heads=2, intermediate_size=8)
    module = build_mlp(settings, base_width=16)
    delta = module.correct_packed(
        {"final": torch.randn(3, 16)}, pack(torch.tensor([3])), torch.arange(3)
    )
    assert torch.equal(delta, torch.zeros(3, 16))


@torch.no_grad()
def plain_nll(model: Any, store: Store) -> float:  # noqa: ANN401
    """Return the loss of the held-out targets by a whole forward pass of transformers."""
    total, count = 0.0, 0
    for index in store.sample_held_out.nonzero()[0].tolist():
        read = store.read_sample(index, taps=[])
        tokens = torch.from_numpy(read.tokens).long()
        logits = model(tokens[None]).logits[0].double().log_softmax(-1)
        for at in read.loss_mask.nonzero()[0].tolist():
            if at:
                total -= float(logits[at - 1, tokens[at]])
                count += 1
    return total / count


def test_lora_is_saved_as_it_was_trained(base_folder: Path, store: Path, tmp_path: Path) -> None:
    import peft

    result = train_lora(
        base=str(base_folder), store=str(store), out=str(tmp_path / "lora"), seconds=1.0,
        learning_rates=[1e-9, 1e-2, 1e-8], sampled_softmax=0, forward=CPU,
    )  # fmt: skip
    assert result["learning_rate"] == 1e-2  # the best of them, which is neither first nor last
    assert (
        result["nll_by_rate"]["0.01"]
        == result["lora_nll"]
        < min(result["nll_by_rate"][rate] for rate in ("1e-09", "1e-08"))
    )
    opened = Store.open(store)
    model = load_base(str(base_folder), forward=CPU).model
    assert plain_nll(model, opened) == pytest.approx(result["base_nll"], abs=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # PEFT reads a deprecated attribute
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    assert plain_nll(adapted, opened) == pytest.approx(result["lora_nll"], abs=0.02)
    assert result["lora_nll"] < result["base_nll"] - 0.03
    assert result["train_s"] >= 0.5
    with pytest.raises(InputError, match="--run: expected a run or --seconds"):
        train_lora(base="none", store=str(store), out="none", forward=CPU)
    for rates in ([], [1e-3, 0.0], [float("nan")]):
        with pytest.raises(InputError, match="--learning-rates: expected one or more above 0"):
            train_lora(base="none", store=str(store), out="none", learning_rates=rates, forward=CPU)


def test_too_short_a_clock_for_lora_is_told(
    base_folder: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train_lora(
        base=str(base_folder), store=str(store), out=str(tmp_path / "lora"), seconds=1e-6,
        sampled_softmax=0, forward=CPU,
    )  # fmt: skip
    assert result["steps"] == 1
    assert "LoRA: expected 20 steps or more, got 1 in 0 s: it has learned little" in caplog.text


# Counts


def verdicts(text: str) -> dict[str, bool]:
    return {f"p{number}": sign == "1" for number, sign in enumerate(text)}


def test_rows_count_seeds_and_pairs() -> None:
    given = {
        "base": [verdicts("110000")],
        "instruct": [verdicts("111000")],
        "few-shot": [verdicts("001000")],
        "bottleneck": [verdicts("011110"), verdicts("011100")],
    }
    made = rows.make_rows("t", given, cuts=dict.fromkeys(given, 0.0), costs={})
    by_arm = {row.arm: row for row in made}
    own = by_arm["bottleneck"]
    assert own.right == [4, 3]
    assert own.accuracy == pytest.approx(3.5 / 6)
    assert own.worst == pytest.approx(3 / 6)
    assert own.low < own.accuracy < own.high
    # won p2, p3, p4 (in one seed of two); lost p0
    assert own.against_base == Paired(won=3, lost=1, p=0.625)
    # The instruction is right more often than the examples: won p3, p4; lost p0
    assert own.against_prompt == Paired(won=2, lost=1, p=1.0)
    assert by_arm["instruct"].against_base == Paired(won=1, lost=0, p=1.0)
    for goal, value in (
        (recipes.Goal(against="nothing", at_least=0.8), 3 / 6),
        (recipes.Goal(against="base", at_least=0.0), 3 / 6 - 2 / 6),
        (recipes.Goal(against="prompt", at_least=-0.03), 3 / 6 - 3 / 6),
    ):
        *_, figure = rows.figures_of(made, goal=goal, kind="bottleneck")
        assert (figure.figure, figure.value) == ("cot.t.goal", pytest.approx(value))
        assert figure.met is (value >= goal.at_least)
    assert len(rows.figures_of(made, goal=None, kind="bottleneck")) == len(made)


def test_a_goal_that_is_reached_exactly_is_met() -> None:
    given = {
        "base": [verdicts("0" * 100)],
        "instruct": [verdicts("1" * 73 + "0" * 27)],
        "bottleneck": [verdicts("1" * 70 + "0" * 30)],
    }
    made = rows.make_rows("t", given, cuts=dict.fromkeys(given, 0.0), costs={})
    goal = recipes.Goal(against="prompt", at_least=-0.03)
    assert rows.figures_of(made, goal=goal, kind="bottleneck")[-1].met is True


def test_a_report_shows_all_rows(tmp_path: Path) -> None:
    given = {"base": [verdicts("10")], "bottleneck": [verdicts("11")]}
    costs = {"bottleneck": rows.Costs(bytes=1_390_000, extract_s=60.0, train_s=47.4, nll=0.04)}
    made = rows.make_rows("t", given, cuts=dict.fromkeys(given, 0.0), costs=costs)
    assert write_report(tmp_path, made, {"base": "b"})
    table = (tmp_path / "table.md").read_text()
    assert "| t | bottleneck | 2 of 2 | 100.0% [34.2%, 100.0%] |" in table
    assert "| 1.39 | 0.040 | 60 | 47 | 107 |" in table
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["rows"][1]["clock_s"] == pytest.approx(107.4)


def test_answers_other_than_those_that_were_counted_are_one_line(tmp_path: Path) -> None:
    path, counted = tmp_path / "answers.jsonl", {"base": {"problems": 2, "right": 1.0}}
    lines = [{"format": 1}]
    lines += [{"arm": "base", "id": f"p{at}", "is_right": at == 1} for at in range(2)]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_text(text)
    read = experiment.read_verdicts(path, counted)
    assert read == {"base": verdicts("01")}
    others = ["", text[:-9], text.replace("p1", "p0"), text.replace("true", "false"), "[]\n[]\n"]
    for other in others:
        path.write_text(other)
        with pytest.raises(DamagedFileError, match="expected the answers that were scored"):
            experiment.read_verdicts(path, counted)
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"Fix: remove it, and .*score-\*\.json"):
        experiment.read_verdicts(path, counted)


# A run

RULE = """
def accept(text, problem):
    return sum(map(ord, text)) % 4 != 0
"""


def argv_of(base: Path, *more: str) -> list[str]:
    argv = ["experiment-cot", "--base", str(base), "--out", "out", "--tasks", LEGS]
    argv += ["--num", "3", "--samples", "8", "--shots", "1", "--max-new-tokens", "4"]
    argv += ["--rule", "easy_rule:accept", "--epochs", "1", "--tokens-per-step", "1024"]
    argv += ["--sampled-softmax", "0", "--device", "cpu", "--compute-dtype", "float32"]
    return [*argv, "--kinds", "bottleneck", "mlp", "--lora", *more]


@pytest.mark.slow
def test_a_task_is_taught_counted_and_resumed(
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easy_rule.py").write_text(RULE)
    argv = argv_of(base_folder, "--seeds", "0")
    done = list[str]()
    write_json = steps.write_json

    def stop_behind_extraction(path: Path, document: Any) -> None:  # noqa: ANN401
        write_json(path, document)
        done.append(path.name)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_json", stop_behind_extraction)
    assert main(argv) == 130
    assert main(argv) == 0
    expected = ["corpus", "extract", "bottleneck", "mlp", "lora", "score-bottleneck-mlp-lora"]
    assert done == [f"{name}.json" for name in expected]  # each once
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    arms = ["base", "instruct", "few-shot", "bottleneck", "mlp", "lora"]
    folder = tmp_path / "out" / "leg_counting-min_animals-2-max_animals-3"
    assert [each["figure"] for each in figures] == [f"cot.{folder.name}.{arm}" for arm in arms]
    answers = read_lines(folder / "answers.jsonl")[1:]
    assert len(answers) == 3 * len(arms)
    for arm, figure in zip(dict.fromkeys(each["arm"] for each in answers), figures, strict=True):
        right = [each["is_right"] for each in answers if each["arm"] == arm]
        assert figure["right"] == [sum(right)]
    assert figures[-1]["clock_s"] >= 0.5 * figures[3]["clock_s"]  # LoRA's, and the first kind's
    costs = [figure["costs"] for figure in figures]
    assert costs[3]["extract_s"] == costs[4]["extract_s"] > 0.0 == costs[5]["extract_s"]
    counted = json.loads((folder / "seed-0" / f"{expected[-1]}.json").read_text())["result"][0]
    assert [figure["cut"] for figure in figures] == [arm["cut"] for arm in counted["arms"]]

    assert main(argv_of(base_folder, "--seeds", "0", "1")) == 0
    assert done[6:] == [f"{name}.json" for name in expected[2:]]  # of the other seed
    made = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [len(row["right"]) for row in made] == [1, 1, 1, 2, 2, 2]
    assert main([*argv_of(base_folder, "--seeds", "0"), "--samples", "9"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "expected the result of this command, got that of one with '8' in place of '9'" in line


@pytest.mark.slow
def test_own_answers_behind_examples_and_told_ones_are_taught(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easy_rule.py").write_text(RULE)
    argv = argv_of(base_folder, "--seeds", "0")
    argv[argv.index(LEGS)] = "chain_sum"
    argv = argv[: argv.index("--kinds")]
    argv += ["--max-new-tokens", "96"]  # most answers of a tiny base never end
    argv += ["--samples", "24", "--rule", "easy_rule:accept", "--seeds", "0", "--batch-rows", "64"]
    assert main(argv) == 0
    folder = tmp_path / "out" / "chain_sum"
    hinted = json.loads((folder / "hinted.json").read_text())["result"]
    extracted = json.loads((folder / "extract.json").read_text())
    data = extracted["argv"][
        extracted["argv"].index("--data") + 1 : extracted["argv"].index("--out")
    ]
    assert data == ["chain_sum/corpus.jsonl", "chain_sum/hinted.jsonl"][: 1 + bool(hinted)]
    assert bool(hinted) == (folder / "hinted.jsonl").exists()
    assert Store.open(folder / "store").num_samples == sum(
        len(read_lines(tmp_path / "out" / name)) for name in data
    )
    assert len(read_lines(folder / "shown.jsonl")) == 5


def test_wrong_words_leave_no_folder(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["experiment-cot", "--base", str(base_folder), "--out", str(out)]
    assert main([*argv, "--tasks", "nosuch"]) == 2
    assert "--tasks: expected some of leg_counting" in capsys.readouterr().err
    assert main([*argv, "--num", "0"]) == 2
    assert "--num: expected 1 or more, got 0" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.real
def test_a_real_base_learns_to_end_in_plain_words(
    real_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["experiment-cot", "--base", str(real_base), "--out", str(tmp_path / "out")]
    argv += ["--tasks", "leg_counting", "--seeds", "0", "--samples", "12", "--num", "2"]
    argv += ["--epochs", "6", "--shots", "2", "--max-new-tokens", "24"]
    argv += ["--lora", "--lora-rates", "5e-4"]
    assert main(argv) == 0
    rows_ = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    nlls = {row["arm"]: row["costs"]["nll"] for row in rows_}
    assert nlls["bottleneck"] < nlls["base"] - 0.2
    assert nlls["lora"] < nlls["base"], "of some steps: it has the clock of the carry-on"
    answers = read_lines(tmp_path / "out" / "leg_counting" / "answers.jsonl")[1:]
    by_arm = {each["arm"]: each for each in answers}
    assert len(by_arm) == len(rows_) == 5
    assert len(capsys.readouterr().out.splitlines()) == len(rows_) + 1
