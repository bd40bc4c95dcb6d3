"""Exact and generous scoring of generated answers."""

import pytest
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.train.config import GenerateSettings
from carryon.train.inference.accuracy import Problem, ends_right, is_exact, make_problems, score
from carryon.train.inference.modeling import CarryOnForCausalLM

SHORT = GenerateSettings(max_new_tokens=5)


def test_an_exact_answer_is_the_right_one_and_nothing_else() -> None:
    assert is_exact(" 42\n", "42")
    assert not is_exact("It is 42", "42")
    assert not is_exact("42.", "42")


@pytest.mark.parametrize(
    ("text", "right", "verdict"),
    [
        ("12 + 30 = 42", "42", True),
        ("The sum is 1,042.", "1042", True),
        ("so -7", "-7", True),
        ("42.0", "42", True),
        ("42 and then 43", "42", False),
        ("no number", "42", False),
        ("It is Blue.", "blue", True),
        ("blue or red", "blue", False),
    ],
)
def test_generous_scoring_reads_the_end(text: str, right: str, verdict: bool) -> None:
    assert ends_right(text, right) is verdict


def test_problems_repeat_with_their_seed_and_take_settings() -> None:
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    problems = make_problems(task, num=5, seed=3)
    assert problems == make_problems(task, num=5, seed=3)
    assert problems != make_problems(task, num=5, seed=4)
    assert len(problems) == 5
    assert all(abs(int(problem.answer)) <= 18 for problem in problems)


@pytest.mark.parametrize("task", ["no_such_task", "chain_sum:terms=2", "chain_sum:min_terms"])
def test_an_unknown_task_or_setting_is_refused(task: str) -> None:
    with pytest.raises(InputError, match="task .*: expected a task of reasoning-gym"):
        make_problems(task, num=1, seed=0)


def test_right_answers_are_counted(tiny_base: Base) -> None:
    model = CarryOnForCausalLM(tiny_base, *make_tiny_carryon(tiny_base))
    questions = ["the an", "in the thing", "on"]
    texts = [model.answer(question, settings=SHORT) for question in questions]
    rights = [texts[0], texts[1] + " not", texts[2]]
    problems = [
        Problem(question=question, answer=right)
        for question, right in zip(questions, rights, strict=True)
    ]
    scored = score(model, problems, settings=SHORT, batch_rows=2)
    assert scored.texts == texts
    assert scored.exact == pytest.approx(2 / 3)
    assert score(model, problems, settings=SHORT, batch_rows=2, alpha=0.0).texts != texts
