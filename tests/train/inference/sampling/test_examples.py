"""Examples and hints: what a prompt shows, and how many examples it has room for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import InputError, NothingRightError
from carryon.train.inference.sampling.examples import draw_examples, fit_shots
from carryon.train.inference.sampling.posing import drop_unhinted
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.problems import Problem, find_result, read_problems
from carryon.train.inference.scoring.rules import parse_rule

HINTED = Arm(name="base", model="base", shots=2, hint="It is {answer}.")


def problem(number: int, *, rule: str = "last-number", **more: Any) -> Problem:  # noqa: ANN401
    facts: dict[str, Any] = {"question": f"What {number}?", "answer": f"so {number}", **more}
    return Problem(id=f"p{number}", rule=parse_rule(rule), result=f"{number}", **facts)


class Words:
    """Counts words in place of a model's tokens."""

    def encode(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        return [[0] * sum(len(each["content"].split()) for each in prompt) for prompt in prompts]


def contents(arm: Arm, posed: Problem, examples: Sequence[Problem]) -> list[str]:
    return [each["content"] for each in arm.make_prompt(posed, examples)]


def test_a_hint_stands_behind_the_question_and_those_of_the_examples() -> None:
    shown = [problem(1), problem(2), problem(3)]
    assert contents(HINTED, problem(9), shown) == [
        *("What 1?\n\nIt is 1.", "so 1", "What 2?\n\nIt is 2.", "so 2"),
        "What 9?\n\nIt is 9.",
    ]
    asked = replace(HINTED, shots=0, instruction="Think.")
    assert contents(asked, problem(9), shown) == ["What 9?\n\nThink.\n\nIt is 9."]
    braces = replace(problem(9), result=r"\frac{answer}{2} {0}")
    assert contents(HINTED, braces, ()) == [r"What 9?" + "\n\n" + r"It is \frac{answer}{2} {0}."]


def test_a_problem_is_not_its_own_example() -> None:
    shown = [problem(1), problem(2), problem(3)]
    texts = contents(HINTED, problem(1), shown)
    assert [text for text in texts if text.startswith("so")] == ["so 2", "so 3"]


def test_a_right_answer_is_told_without_its_working(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"question": "a", "answer": "3 + 4 = 7\n#### 7"}, {"question": "b", "answer": "12"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    posed = read_problems(str(path), num=5, seed=0)
    assert [each.result for each in posed] == ["7", "12"]
    boxed = problem(0, rule="boxed")
    assert find_result(r"so \boxed{x + 1}", boxed.rule) == "x + 1"
    assert find_result("no box", boxed.rule) == "no box"
    sampled = {"right": r"long, so \boxed{8}", "question": "c"}
    path.write_text(json.dumps({"question": "c", "answer": "mine: 8", "sampled": sampled}) + "\n")
    [drawn] = draw_examples({"t": [boxed]}, source=str(path), shots=1, seed=0)
    assert [(each.answer, each.result) for each in drawn["t"]] == [("mine: 8", "8")]


def test_a_task_tells_its_answer_as_it_is() -> None:
    pytest.importorskip("reasoning_gym")
    [posed, *_] = read_problems("chain_sum", num=2, seed=1)
    assert posed.result == posed.answer
    sets = draw_examples({"chain_sum": [posed]}, source="", shots=3, sets=2, seed=1)
    drawn = [each for one in sets for each in one["chain_sum"]]
    assert len({each.question for each in drawn}) == 2 * 4
    assert all(each.result == each.answer for each in drawn)


def test_examples_ask_different_questions_one_more_than_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"q{at % 5}", "answer": f"{at}"} for at in range(20)]
    rows.append({"question": "q9", "answer": "9", "split": "held-out"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    posed = {"t": [problem(0)], "u": [problem(1)]}
    for seed in range(8):
        [drawn] = draw_examples(posed, source=str(path), shots=3, seed=seed)
        assert drawn["t"] == drawn["u"]
        questions = [each.question for each in drawn["t"]]
        assert len(set(questions)) == len(questions) == 4
        assert "q9" not in questions
    assert draw_examples(posed, source=str(path), shots=3, seed=1) != [drawn]
    assert draw_examples(posed, source=str(path), shots=0, seed=1) == [{"t": [], "u": []}]
    assert not caplog.records
    with caplog.at_level("INFO"):
        [drawn] = draw_examples(posed, source=str(path), shots=8, seed=1)
    assert len(drawn["t"]) == 5
    assert "5 examples, not 8" in caplog.text
    path.write_text(json.dumps({"question": "q", "answer": ""}) + "\n")
    with pytest.raises(InputError, match="--examples: expected solved problems, got none in"):
        draw_examples(posed, source=str(path), shots=1, seed=1)


def test_sets_of_examples_share_no_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"question": "q{at}", "answer": "{at}"}}\n' for at in range(10)))
    posed = {"t": [problem(0)]}
    with caplog.at_level("INFO"):
        sets = draw_examples(posed, source=str(path), shots=2, sets=3, seed=1)
        assert not caplog.records
        assert [len(each["t"]) for each in sets] == [3, 3, 3]
        assert len({each.question for one in sets for each in one["t"]}) == 9
        assert draw_examples(posed, source=str(path), shots=2, sets=1, seed=1) == sets[:1]
        assert draw_examples(posed, source=str(path), shots=2, sets=5, seed=1) == sets
    assert "--example-sets: the examples make 3 of 5: those" in caplog.text


def test_as_many_examples_as_leave_room(caplog: pytest.LogCaptureFixture) -> None:
    # 7 words an example, 5 the question: What 9? It is 9.
    arm = replace(HINTED, shots=4)
    posed: Any = {"t": [problem(9), problem(8, question="too long " * 50)], "none": []}
    shown: Any = {"t": [problem(at) for at in range(5)], "none": []}
    model: Any = Words()
    assert fit_shots(arm, model, posed, shown, room=33) == arm
    assert not caplog.records
    assert fit_shots(arm, model, posed, shown, room=32).shots == 3
    assert "--shots: 3 of 4 leave room for an answer" in caplog.text
    assert fit_shots(arm, model, posed, shown, room=11).shots == 0
    assert fit_shots(arm, model, posed, shown, room=1).shots == 4  # nothing fits: told elsewhere


def test_problems_whose_answer_is_not_known_get_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    known, unknown = problem(1), replace(problem(2), result="")
    assert drop_unhinted({"t": [known, unknown], "u": [unknown]}, "is {answer}") == {"t": [known]}
    assert "2 of 3 problems have no known answer: left out" in caplog.text
    assert drop_unhinted({"t": [unknown]}, "") == {"t": [unknown]}
    with pytest.raises(NothingRightError, match="--hint: expected problems whose right answer is"):
        drop_unhinted({"t": [unknown]}, "is {answer}")
