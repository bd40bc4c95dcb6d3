"""Rules that judge an answer, and how numbers are compared."""

from fractions import Fraction
from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.cache.time_limit import limited_time
from carryon.train.inference.scoring import rules
from carryon.train.inference.scoring.numbers import find_numbers, find_stated, get_value
from carryon.train.inference.scoring.problems import Problem
from carryon.train.inference.scoring.rules import find_last_number, find_marked, parse_rule


def is_right(rule: str, text: str, right: str) -> bool:
    parsed = parse_rule(rule)
    return Problem(id="1", question="?", answer=right, rule=parsed).is_right(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", 1000),
        ("1000.0", 1000),
        ("$12.50", Fraction(25, 2)),
        ("50%", 50),
        ("-3", -3),
        ("\u22124", -4),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("\\frac{1}{2}", Fraction(1, 2)),
        ("$-5$", -5),
        ("**34**.", 34),
        ("34 legs", 34),
        ("12\\text{ kg}", 12),
        ("1e-2", Fraction(1, 100)),
        ("\\(16\\)", 16),
        ("2.5 million", 2_500_000),
        ("12kg", 12),
        ("34b", None),
        ("3x", None),
        ("- 3", -3),
        ("-1 1/2", Fraction(-3, 2)),
        ("1{,}000", 1000),
        ("1.5 \\times 10^3", 1500),
        ("148^\\circ", 148),
        ("16\\,\\text{legs}", 16),
        ("\\text{\\$16}", 16),
        ("\\left(16\\right)", None),
        ("1\\frac{1}{2}", Fraction(3, 2)),
        ("3/0", None),
        ("3-4", None),
        ("1 and 2", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_a_number_has_its_value_in_any_writing(text: str, value: Fraction | int | None) -> None:
    assert get_value(text) == value


def test_numbers_are_found_in_sentences() -> None:
    assert find_numbers("12-5 = 7, of 1,000 or -3.") == ["12", "5", "7", "1,000", "-3"]
    assert find_numbers("1,2,3 in v1.2") == ["1", "2", "3"]
    assert find_numbers("It is 3/4.") == ["3/4"]
    assert find_numbers("on 1/20/2024, 3/4.5") == ["1", "20/2024", "3", "4.5"]
    assert find_numbers("\\frac{3}{4} of 5 million") == ["3/4", "5 million"]
    assert find_numbers("x = - 3, 5 - 3, is - 2\n- 4") == ["-3", "5", "3", "-2", "4"]


@pytest.mark.parametrize(
    ("rule", "text", "right", "verdict"),
    [
        ("last-number", "12 + 30 = 42", "42", True),
        ("last-number", "It is 1,042.", "1042", True),
        ("last-number", "42.0", "So it is 42", True),
        ("last-number", "42 and then 43", "42", False),
        ("last-number", "none", "42", False),
        ("boxed", "so \\boxed{\\frac{1}{2}}", "0.5", True),
        ("boxed", "\\boxed{1} no, \\boxed{x_{2}}", "\\boxed{x_{2}}", True),
        ("boxed", "\\boxed{5} and \\boxed{6", "5", True),
        ("boxed", "}{ \\boxed{a}} and {\\boxed {b}", "b", True),
        ("boxed", "\\boxed{\\boxed{5} + 1}", "5", True),
        ("boxed", "5", "5", False),
        ("after:####", "40 + 80 = 120\n#### 120 legs", "work\n#### 120", True),
        ("after:####", "40 + 80 = 120\n#### 106", "120", False),
        ("after:the answer is", "The Answer is: **blue**.\nYes", "Blue", True),
        ("after:Answer", "Answer:\n\n 12", "12", True),
        ("after:Answer", "12", "12", False),
        ("after:answer", "\u0130\u0130\u0130 answer 12", "12", True),
        (r"regex:.*", "12", "12", True),
        (r"regex:= (\S+)", "1 = 2\n2 = 3", "3", True),
        (r"regex:\d+ legs", "3 legs", "3 legs", True),
        (r"regex:= (\d)", "three", "3", False),
        ("exact", " 42\n", "42", True),
        ("exact", "42.", "42", False),
        ("exact", "It is 42", "42", False),
        ("end", "It is Blue.", "blue", True),
        ("end", "blue or red", "blue", False),
        ("end", "it is unblue", "blue", False),
        ("end", "so -7", "-7", True),
        ("end", "", "blue", False),
        ("last-number", "The answer is 3/4.", "3/4", True),
        ("last-number", "The answer is 3/4.", "4", False),
        ("last-number", "So x = - 3", "-3", True),
        ("last-number", "The answer is 4", "\\frac{3}{4}", False),
        ("last-number", "The answer is 3/4", "\\frac{3}{4}", True),
        ("last-number", "about 5 million", "5", False),
        ("end", "The probability is 1/2.", "2", False),
        ("end", "It leaves at 7 AM.", "7 PM", False),
        ("end", "It leaves at 7 pm, I think", "7 PM", True),
        ("end", "The number of legs is 34 in all.", "34 legs", True),
        ("boxed", "\\boxed{\\frac{3}{4}}", "4", False),
        ("boxed", "\\boxed{x^2}", "2", False),
        ("boxed", "\\boxed{\\sqrt{2}}", "2", False),
        ("boxed", "\\boxed{2\\sqrt{3}}", "2", False),
        ("boxed", "\\boxed{10^6}", "10", False),
        ("boxed", "\\boxed{12 - 5}", "12", False),
        ("boxed", "\\boxed{16, 25}", "16", False),
        ("boxed", "\\boxed{(3, 4)}", "4", False),
        ("boxed", "\\boxed{16:30}", "16", False),
        ("boxed", "\\boxed{5 m}", "5 km", False),
        ("boxed", "\\boxed{5}", "5 km", True),
        ("boxed", "\\boxed{3y}", "3x", False),
        ("boxed", "\\boxed{5 million}", "5", False),
        ("boxed", "\\boxed{16 \\text{ legs}}", "16", True),
        ("boxed", "\\boxed{16\\,\\text{m}^2}", "16", True),
        ("boxed", "\\boxed{\\approx 16}", "16", True),
        ("boxed", "\\boxed{\\left(16\\right)}", "16", True),
        ("boxed", "\\boxed{5 \\text{ kilometers}}", "5 km", True),
        ("boxed", "\\boxed{1.5 \\times 10^3}", "1500", True),
        ("boxed", "\\boxed{2\\pi}", "2", False),
        ("boxed", "\\boxed{\\pm 4}", "4", False),
        ("boxed", "\\boxed{x > 16}", "16", False),
        ("boxed", "\\boxed{- 3}", "-3", True),
        ("boxed", "\\boxed{1 1/2}", "1", False),
        ("end", "It weighs 5 lbs.", "5 lb", True),
        ("last-number", "It takes $1\\frac{1}{2}$ cups", "1.5", True),
        ("boxed", "\\boxed{\\text{Total: } 16 \\text{ legs}}", "16", True),
        ("after:####", "#### 10^6", "10", False),
        ("after:####", "#### **16** legs - 3 dogs", "16", True),
        ("after:####", "#### x - 5", "5", False),
        ("after:####", "#### the total (16)", "16", True),
        ("after:####", "#### 2(3)", "3", False),
    ],
)
def test_rules_judge(rule: str, text: str, right: str, verdict: bool) -> None:
    assert is_right(rule, text, right) is verdict


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("1 + 1\nTherefore, the final answer is 2.", "2"),
        ("The answer is 3. No: the answer is **4**", "4"),
        ("<answer>5</answer> so", "5"),
        ("<answer>4</answer> no, <Answer>\n5</ANSWER> so <answer>6", "5"),
        ("Answer: \\boxed{6}", "6"),
        ("work\n\nseven\n", None),
        ("", None),
    ],
)
def test_the_marked_answer_of_a_text(text: str, final: str | None) -> None:
    assert find_marked(text) == final


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("16", True),
        ("3 dogs have 12 legs and 2 birds have 4, so there are 16 legs.", True),
        ("3 * 4 = 12, 2 * 2 = 4\n12 + 4 = 16", True),
        ("The final answer is 16 legs, of 3 dogs and 2 birds.", True),
        ("Answer: the dogs have 12 and the birds have 4, so 16", True),
        ("The answer is 12 + 4 = 16.\nI hope that the 5 animals are well.", True),
        ("**Answer:** \\boxed{16}", True),
        ("There are 16 legs on 5 animals.", False),
        ("The answer is 15. 16", False),
        ("#### 106", False),
        ("160", False),
    ],
)
def test_a_task_takes_a_number_in_a_sentence(text: str, verdict: bool) -> None:
    def verify(answer: str) -> float:  # as reasoning-gym does
        return 1.0 if answer == "16" else 0.01

    rule = parse_rule("task")
    problem = Problem(id="1", question="?", answer="16", rule=rule, verify=verify)
    assert problem.is_right(text) is verdict


@pytest.mark.parametrize(
    ("right", "text", "verdict"),
    [
        ("34a", "34b", False),
        ("34a", "The answer is 34.", False),
        ("$244/607$", "$17080/42490$", False),
        ("$244/607$", "The answer is $17080 / 42490$", False),
        ("$244/607$", "The answer is $\\frac{244}{607}$.", True),
        ("$244/607$", "So it is 244 / 607.", True),
        ("1", "73 / 73", False),
        ("1", "The answer is 73 / 73.", False),
        ("1", "73 / 73 = 1", True),
        ("16", "It is 2^16", False),
        ("16", "The final answer is \\(16\\).", True),
        ("148", "The remaining angle is $148^\\circ$.", True),
        ("392", "The answer is $392_5$", True),
        ("16", "<answer>\\boxed{16}</answer>", True),
        ("16", "She makes $16/day.", True),
        ("16", "Total legs = 16\n\n*Note: dogs have four.*", True),
        ("16", "The result is *16*.", True),
        ("16", "### Final Answer\n\n- 16", True),
        ("16", "12 + 4 -> 16", True),
        ("16", "print(16)", True),
        ("16", "Final Answer: 16\n\nI hope this answer is helpful!", True),
        ("16", "The answer is 16, because 3 * 4 = 12 and 2 * 2 = 4.", True),
        ("4", "The answer is 16, because 3 * 4 = 12 and 2 * 2 = 4.", False),
        ("16", "The area is $16 \\text{ cm}^2$.", True),
        ("2", "The area is $16 \\text{ cm}^2$.", False),
        ("1000", "So it is $1{,}000$.", True),
        ("-16", "The answer is\n- 16 legs", False),
    ],
)
def test_a_task_takes_no_part_of_the_question(right: str, text: str, verdict: bool) -> None:
    rule = parse_rule("task")
    problem = Problem(id="1", question="?", answer=right, rule=rule, verify=lambda _: 0.1)
    assert problem.is_right(text) is verdict


@pytest.mark.parametrize("text", ["Answer:\n```\n1 2\n3 4\n```", "The answer is: 1 2\n3 4"])
def test_a_verifier_sees_all_that_is_marked(text: str) -> None:
    rule, right = parse_rule("task"), "1 2\n3 4"
    problem = Problem(
        id="1", question="?", answer=right, rule=rule, verify=lambda text: float(text == right)
    )
    assert problem.is_right(text)
    assert not problem.is_right(text.replace("4", "5"))


def test_a_function_of_the_user_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules_a.py").write_text(
        "def near(text, problem):\n    return abs(int(text) - int(problem.answer)) < 2\n"
        "def half(text, problem):\n    return 0.5\n"
        "def odd(text, problem):\n    return 'yes'\n"
        "import numpy, sys\n"
        "def close(text, problem):\n"
        "    return numpy.isclose(float(text), float(problem.answer))\n"
        "def ends(text, problem):\n"
        "    sys.exit(0)\n"
    )
    assert is_right("my_rules_a:near", "41", "42")
    assert not is_right("my_rules_a:near", "40", "42")
    assert not is_right("my_rules_a:half", "40", "42")
    with pytest.raises(InputError, match=r"ValueError: invalid literal.* \(my_rules_a.py:2\)"):
        is_right("my_rules_a:near", "many", "42")
    assert is_right("my_rules_a:close", "42", "42")
    assert not is_right("my_rules_a:close", "41", "42")
    with pytest.raises(InputError, match=r"SystemExit: 0 \(my_rules_a.py:11\)"):
        is_right("my_rules_a:ends", "many", "42")
    with pytest.raises(InputError, match="expected true or false, or 0 to 1, got str"):
        is_right("my_rules_a:odd", "many", "42")


def test_a_faulty_module_is_named_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules_b.py").write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(InputError, match=r"ZeroDivisionError: .* \(my_rules_b.py:2\)"):
        parse_rule("my_rules_b:near")
    (tmp_path / "my_rules_d.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(InputError, match=r"SystemExit: 0 \(my_rules_d.py:2\)"):
        parse_rule("my_rules_d:near")


@pytest.mark.parametrize(
    "text",
    ["", "last", "after:", "after: ", "regex:", "regex:(", "no_such_module_x:f", "json:nothing",
     "string:digits", ":f", "json:"],
)  # fmt: skip
def test_a_wrong_rule_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="^rule") as caught:
        parse_rule(text)
    assert "\n" not in str(caught.value)


def test_a_pattern_without_an_end_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_SECONDS", 0.1)
    with pytest.raises(InputError, match="it takes more than 0.1 s on the answer 'aaa") as caught:
        is_right(r"regex:(a+)+$", "a" * 60 + "b", "42")
    assert "Fix: a simpler pattern" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["\\boxed{", "<answer>", "answer is ", "</answer>", "1,111", "1, ", "** "]
)
def test_an_answer_that_repeats_itself_is_read_in_no_time(text: str) -> None:
    with limited_time(5):  # a second or less; minutes where each start is read to the end
        find_marked(text * 20_000)
        find_last_number(text * 20_000)
        find_stated(text * 20_000)
        find_stated(f"({text * 20_000}")


def test_a_verifier_without_an_end_accepts_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rules, "MAX_SECONDS", 0.1)
    rule = parse_rule("task")
    problem = Problem(id="p7", question="?", answer="x", rule=rule, verify=lambda text: eval(text))  # noqa: S307
    assert not problem.is_right("9**9**9")
    assert "p7: verifier: it takes more than 0.1 s on the answer '9**9**9': wrong" in caplog.text


def test_a_function_without_an_end_is_named_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "MAX_FUNCTION_SECONDS", 0.1)
    text = "def f(text, problem):\n    while True:\n        pass\n"
    (tmp_path / "my_rules_c.py").write_text(text)
    with pytest.raises(InputError, match=r"it takes more than 0.1 s \(my_rules_c.py:[23]\)"):
        is_right("my_rules_c:f", "many", "42")
