"""Arms: how they are typed, and the prompts that they make."""

import pytest

from carryon.cache.errors import InputError, MissingExtraError
from carryon.train.inference.scoring.arms import Arm, parse_arms
from carryon.train.inference.scoring.problems import Problem
from carryon.train.inference.scoring.rules import parse_rule
from carryon.train.inference.scoring.vllm_engine import uses_vllm


def one(text: str) -> Arm:
    [arm] = parse_arms([text], has_carryon=True)
    return arm


def make(question: str, answer: str, *before: dict[str, str]) -> Problem:
    return Problem(id="1", question=question, answer=answer, rule=parse_rule("end"), before=before)


def test_without_arms_base_and_carryon_are_compared() -> None:
    assert [arm.name for arm in parse_arms([], has_carryon=True)] == ["base", "carryon"]
    assert [arm.name for arm in parse_arms([], has_carryon=False)] == ["base"]


@pytest.mark.parametrize(
    ("text", "model", "place", "alpha", "instruction", "shots"),
    [
        ("base", "base", "", None, "", 0),
        ("carryon", "carryon", "", None, "", 0),
        ("carryon@0.5", "carryon", "", 0.5, "", 0),
        ("carryon=run/a@2", "carryon", "run/a", 2.0, "", 0),
        ("carryon=run/a", "carryon", "run/a", None, "", 0),
        ("merged=a=b", "merged", "a=b", None, "", 0),
        ("lora=out/lora", "lora", "out/lora", None, "", 0),
        ("instruct:think: a+b", "base", "", None, "think: a+b", 0),
        ("few-shot:4", "base", "", None, "", 4),
        ("carryon@0.5+instruct:x", "carryon", "", 0.5, "x", 0),
        ("merged=m+few-shot:2", "merged", "m", None, "", 2),
    ],
)
def test_arms_are_typed(
    text: str, model: str, place: str, alpha: float | None, instruction: str, shots: int
) -> None:
    arm = one(text)
    assert (arm.name, arm.model, arm.place, arm.alpha) == (text, model, place, alpha)
    assert (arm.instruction, arm.shots) == (instruction, shots)


@pytest.mark.parametrize(
    "text",
    ["", "bases", "base@1", "base=x", "carryon@", "carryon@x", "carryon@-1", "carryon@11",
     "carryon@nan", "merged", "merged=", "lora=", "merged=m@1", "instruct:", "few-shot:",
     "few-shot:0", "few-shot:x", "few-shot:1000", "x+instruct:y"],
)  # fmt: skip
def test_a_wrong_arm_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="^arms: "):
        one(text)


def test_equal_arms_and_a_carryon_without_one_are_refused() -> None:
    with pytest.raises(InputError, match="expected each once, got 'base' twice"):
        parse_arms(["base", "base"], has_carryon=True)
    with pytest.raises(InputError, match="expected a carry-on, got none. Fix: --carryon"):
        parse_arms(["carryon@0.5"], has_carryon=False)
    assert parse_arms(["carryon=x"], has_carryon=False)[0].place == "x"


def test_prompts_hold_examples_behind_the_system_message() -> None:
    system = {"role": "system", "content": "Count."}
    turn = {"role": "user", "content": "Hello"}
    problem = make("a bird?", "2", system, turn)
    examples = [make("a dog?", "4"), make("an ant?", "6")]
    shown = [
        {"role": "user", "content": "a dog?"},
        {"role": "assistant", "content": "4"},
    ]
    question = {"role": "user", "content": "a bird?"}
    assert one("base").make_prompt(problem, examples) == [system, turn, question]
    assert one("few-shot:1").make_prompt(problem, examples) == [system, *shown, turn, question]
    [*_, asked] = one("instruct:Think.").make_prompt(problem, [])
    assert asked["content"] == "a bird?\n\nThink."


def test_vllm_runs_ordinary_checkpoints_only() -> None:
    assert not uses_vllm(one("base"), "folder", engine="transformers")
    assert not uses_vllm(one("carryon"), "folder", engine="auto")
    with pytest.raises(InputError, match="--engine auto"):
        uses_vllm(one("carryon"), "folder", engine="vllm")
    with pytest.raises(InputError, match="--engine auto"):
        uses_vllm(one("base"), "base.gguf", engine="vllm")


def test_vllm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not uses_vllm(one("base"), "folder", engine="auto")
    with pytest.raises(MissingExtraError, match="--engine vllm needs the package 'vllm'"):
        uses_vllm(one("merged=m"), "m", engine="vllm")
