"""Forms of answers: which are right more often than others to the same problems."""

import random
from dataclasses import replace

import pytest
from support.answers import make_answer

from carryon.train.inference.sampling.forms import form_of, rate_forms
from carryon.train.inference.sampling.selection import select
from carryon.train.inference.scoring.answer_file import Answer


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("5 - -3 = 8.", "0 - 0 = 0"),
        ("The  Answer is\n1,024.5", "the answer is 0"),
        ("No number.", "no number"),
        ("", ""),
    ],
)
def test_a_form_is_the_text_without_its_numbers(text: str, form: str) -> None:
    assert form_of(text) == form


def ask(problems: int, chances: dict[str, float], *, seed: int = 0) -> list[list[Answer]]:
    """Return 8 answers to each problem; every second problem is hard: half of the chances."""
    draw = random.Random(seed)
    rows = []
    for number in range(problems):
        row = []
        for sample in range(8):
            form = draw.choice(list(chances))
            is_right = draw.random() < chances[form] / (number % 2 + 1)
            text = form.format(f"{number}{sample}")
            row.append(replace(make_answer(text, is_right=is_right), question=f"What {number}?"))
        rows.append(row)
    return rows


def keep(rows: list[list[Answer]], ratio: float) -> list[str]:
    asked = [str(number) for number in range(len(rows))]
    selection = select(rows, asked=asked, known={}, keep=0, keep_cut=False, form_ratio=ratio)
    counts = selection.counts
    assert counts.kept + counts.poor_form + counts.equal == counts.right
    return [form_of(answer.text) for row in selection.kept for answer in row]


def test_the_form_that_is_right_more_often_is_kept_where_a_problem_has_it() -> None:
    rows = ask(60, {"{} = 4": 0.8, "the answer is {}": 0.2, "so {}": 0.6})
    rates = {
        form_of(answer.text): rate
        for row, own in zip(rows, rate_forms(rows), strict=True)
        for answer, rate in zip(row, own, strict=True)
    }
    assert rates["0 = 0"] > rates["so 0"] > 0 > rates["the answer is 0"]
    kept, all_forms = keep(rows, 0.5), keep(rows, 0.0)
    assert "the answer is 0" in all_forms
    assert set(kept) == {"0 = 0", "so 0"}  # some problems have no right answer of the best form
    assert kept.count("0 = 0") == all_forms.count("0 = 0")


def test_the_form_of_hard_problems_is_not_worse_for_that() -> None:
    rows = ask(40, {"{} + 1": 0.9, "well {}": 0.3})
    rows += ask(40, {"{} - 1": 0.3, "well {}": 0.1}, seed=1)
    assert {"0 + 0", "0 - 0"} <= set(keep(rows, 0.5))


def test_where_no_form_stands_out_none_is_left_out() -> None:
    same = ask(30, {"{} = 4": 0.5})
    assert len(keep(same, 0.5)) == len(keep(same, 0.0))
    names = "abcdefghijklmnopqrstuvwxyz"
    own = [
        [replace(answer, text=f"{names[at % 26]}{names[n]} is it") for n, answer in enumerate(row)]
        for at, row in enumerate(ask(26, {"{}": 0.5}))
    ]
    assert len(keep(own, 0.5)) == len(keep(own, 0.0)) > 50


def test_no_answers() -> None:
    assert rate_forms([]) == []
    assert rate_forms([[]]) == [[]]
    assert keep([[], []], 0.5) == []


def test_luck_in_one_problem_does_not_count() -> None:
    lucky = [make_answer("a lucky form"), *[make_answer("no", is_right=False)] * 7]
    rates = rate_forms([lucky, *ask(10, {"{} = 4": 0.5})])
    assert rates[0][0] == 0


def test_forms_of_their_own_are_compared_by_their_first_words() -> None:
    good, bad = "to solve it one step by {}", "let us guess what it is {}"
    names = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        [
            replace(each, text=f"{each.text} {names[at % 26]}{names[n]}")
            for n, each in enumerate(row)
        ]
        for at, row in enumerate(ask(26, {good: 0.8, bad: 0.3}))
    ]
    rates = [rate for own in rate_forms(rows) for rate in own]
    texts = [answer.text for row in rows for answer in row]
    assert all((rate > 0) == text.startswith("to") for rate, text in zip(rates, texts, strict=True))
