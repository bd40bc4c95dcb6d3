"""Which sampled answers are kept, and the records that they become."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.answers import make_answer

from carryon.cache.errors import InputError, MissingError
from carryon.train.inference.sampling.forms import form_of
from carryon.train.inference.sampling.records import (
    choose_held_out,
    make_record,
    read_known,
    to_lines,
)
from carryon.train.inference.sampling.selection import Counts, select
from carryon.train.inference.scoring.answer_file import Answer
from carryon.train.inference.scoring.problems import Problem
from carryon.train.inference.scoring.rules import parse_rule


def problem(number: int = 0) -> Problem:
    return Problem(id=f"p{number}", question=f"What {number}?", answer="4", rule=parse_rule("end"))


def test_right_answers_are_kept_once_each_up_to_the_limit() -> None:
    row = [
        make_answer("is 4"),
        make_answer("is  4\n"),
        make_answer("5", is_right=False),
        make_answer("so 4", is_cut=True),
        make_answer("it is 4"),
        make_answer("4"),
    ]
    selection = select([row, []], asked=["a", "b"], known={}, keep=2, keep_cut=False)
    assert [[each.text for each in kept] for kept in selection.kept] == [["is 4", "it is 4"], []]
    assert selection.counts == Counts(
        problems=2, tried=6, right=5, cut=1, right_cut=1, equal=1, surplus=1, kept=2, unsolved=1
    )


def test_known_answers_are_not_kept_again_and_count() -> None:
    row = [make_answer("is 4"), make_answer("it is 4"), make_answer("4")]
    selection = select([row], asked=["a"], known={"What?": ["is  4"]}, keep=2, keep_cut=False)
    assert [each.text for each in selection.kept[0]] == ["it is 4"]
    assert (selection.counts.equal, selection.counts.surplus) == (1, 1)
    free = select([row], asked=["a"], known={}, keep=0, keep_cut=False)
    assert free.counts.kept == 3


def test_a_problem_that_is_posed_twice_is_one() -> None:
    rows = [
        [make_answer("is 4"), make_answer("it is 4")],
        [make_answer("is 4"), make_answer("4")],
        [make_answer("is 4")],
    ]
    selection = select(rows, asked=["a", "a", "b"], known={}, keep=2, keep_cut=False)
    assert [[each.text for each in kept] for kept in selection.kept] == [
        ["is 4", "it is 4"],
        [],
        ["is 4"],
    ]
    assert (selection.counts.equal, selection.counts.surplus, selection.counts.kept) == (1, 1, 3)


def test_forms_are_compared_within_a_task() -> None:
    def rows(form: str, chance: float) -> list[list[Answer]]:
        return [
            [
                make_answer(form.format(8 * number + sample), is_right=sample < 8 * chance)
                for sample in range(8)
            ]
            for number in range(20)
        ]

    answers = [*rows("{} = 4", 0.25), *rows("{} = 4", 0.75)]
    answers = [row + more for row, more in zip(answers, rows("so {}", 0.5) * 2, strict=True)]
    tasks = ["hard"] * 20 + ["easy"] * 20
    asked = [str(number) for number in range(40)]
    selection = select(
        answers, asked=asked, known={}, keep=0, keep_cut=False, form_ratio=0.5, tasks=tasks
    )
    texts = [{form_of(answer.text) for answer in row} for row in selection.kept]
    assert texts == [{"so 0"}] * 20 + [{"0 = 0"}] * 20


def test_what_is_asked_twice_is_in_one_half_also_in_a_corpus_of_another_round() -> None:
    many = [problem(number) for number in range(400)]
    again = [replace(each, id=f"again-{each.id}") for each in many]
    chosen = choose_held_out(many, ratio=0.1)
    assert choose_held_out([*many, *again], ratio=0.1) == chosen
    assert choose_held_out(again, ratio=0.1) == chosen
    told = [replace(each, before=({"role": "system", "content": each.id},)) for each in again]
    assert len(choose_held_out([*many, *told], ratio=0.1)) > len(chosen)  # in another context


def test_all_of_a_later_corpus_may_be_held_out() -> None:
    many = [problem(number) for number in range(400)]
    chosen = choose_held_out(many, ratio=0.1)
    held_out = [each for each in many if each.half in chosen]
    assert choose_held_out(held_out, ratio=0.1) == set()
    assert choose_held_out(held_out, ratio=0.1, is_first=False) == chosen


def test_a_group_of_problems_is_held_out_whole() -> None:
    many = [replace(problem(number), group=f"g{number % 40}") for number in range(400)]
    chosen = choose_held_out(many, ratio=0.2)
    halves = [
        {each.group for each in many if (each.half in chosen) is half} for half in (False, True)
    ]
    assert all(halves)
    assert halves[0].isdisjoint(halves[1])
    options = {"is_chat": True, "is_held_out": False, "provenance": {}}
    assert make_record(many[1], "What?", "4", **options)["split_group"] == "g1"
    assert "split_group" not in make_record(problem(1), "What?", "4", **options)


def test_a_cut_answer_is_kept_only_when_told() -> None:
    row = [make_answer("so 4", is_cut=True)]
    assert select([row], asked=["a"], known={}, keep=1, keep_cut=False).counts.kept == 0
    assert select([row], asked=["a"], known={}, keep=1, keep_cut=True).counts.kept == 1


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_record_is_read_back_as_known(tmp_path: Path, is_chat: bool) -> None:
    record = make_record(
        problem(), "What?", " is 4", is_chat=is_chat, is_held_out=True, provenance={"task": "t"}
    )
    assert record["split"] == "held-out"
    assert record["id"].startswith("p0-")
    path = tmp_path / "c.jsonl"
    path.write_bytes(to_lines([record, record]))
    [texts] = [read_known([str(path)])["What 0?"]]
    assert [text.strip() for text in texts] == ["is 4"] * 2


def test_what_is_no_sampled_corpus_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(InputError, match=r"c\.jsonl:1: expected a record of carryon sample"):
        read_known([str(path)])
    with pytest.raises(MissingError, match="got none at"):
        read_known([str(tmp_path / "none")])


def test_held_out_problems_are_the_same_in_every_corpus_and_never_all() -> None:
    many = [problem(number) for number in range(400)]
    chosen = choose_held_out(many, ratio=0.1)
    assert 20 <= len(chosen) <= 60
    assert choose_held_out(many[:200], ratio=0.1) == chosen & {each.asked for each in many[:200]}
    assert choose_held_out(many[:3], ratio=0.9999) == set()
