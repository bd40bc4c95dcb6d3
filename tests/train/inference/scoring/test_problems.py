"""Problems of tasks and of data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import CarryOnError, InputError
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.problems import Problem, read_examples, read_problems

LEGS = "leg_counting:min_animals=2,max_animals=4"


def read(source: str, *, num: int = 100, seed: int = 0, rule: str = "auto") -> list[Problem]:
    return read_problems(source, num=num, seed=seed, rule=rule)


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def key(problems: list[Problem]) -> list[tuple[str, str, str]]:
    return [(problem.id, problem.question, problem.answer) for problem in problems]


def test_a_task_has_its_own_verifier() -> None:
    problems = read(LEGS, num=4, seed=3)
    assert key(problems) == key(read(LEGS, num=4, seed=3))
    assert key(problems) != key(read(LEGS, num=4, seed=4))
    for problem in problems:
        assert problem.rule.name == "task"
        assert problem.is_right(problem.answer)
        assert problem.is_right(f"4 + 3 = 7\nTherefore, the final answer is {problem.answer}.")
        assert not problem.is_right(f"{problem.answer}1")
        assert not problem.is_right("")
    assert problems[0].metadata["source_dataset"] == "leg_counting"


def test_a_verifier_that_knows_many_answers_needs_no_right_one() -> None:
    [problem] = read("graph_color", num=1)
    assert problem.answer == ""
    assert not problem.is_right("blue")
    with pytest.raises(InputError, match="the rule exact expects an answer, got ''"):
        read("graph_color", num=1, rule="exact")


@pytest.mark.parametrize(
    "task",
    [
        "no_such_task",
        "chain_sum:terms=2",
        "chain_sum:min_terms",
        "caesar_cipher:min_words=9999,max_words=9999",
        "calendar_arithmetic:tasks=[]",
    ],
)
def test_an_unknown_task_or_setting_is_refused(task: str) -> None:
    with pytest.raises(InputError, match="task .*: expected a task of reasoning-gym"):
        read(task, num=1)
    with pytest.raises(InputError, match="Fix: leg_counting$"):
        read("leg_countin", num=1)


@pytest.mark.parametrize(
    "record",
    [
        {"question": "2 + 2?", "answer": "4"},
        {"problem": "2 + 2?", "solution": 4},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
        {"messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
        {
            "messages": [
                {"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "4"},
            ]
        },
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ],
)
def test_data_of_any_form_are_problems(record: dict[str, Any], tmp_path: Path) -> None:
    [problem] = read(write(tmp_path / "data.jsonl", record))
    assert (problem.question, problem.answer, problem.before) == ("2 + 2?", "4", ())
    assert problem.rule.name == "last-number"
    assert problem.id.startswith("data-")


def test_messages_before_the_question_are_kept(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": "a dog?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "a bird?"},
        {"role": "assistant", "content": "two"},
    ]
    [problem] = read(write(tmp_path / "data.jsonl", {"id": 7, "messages": messages}))
    assert problem.id == "7"
    assert (problem.question, problem.answer, problem.rule.name) == ("a bird?", "two", "end")
    assert list(problem.before) == messages[:3]


def test_only_held_out_records_are_posed_and_a_draw_repeats(tmp_path: Path) -> None:
    records = [
        {"question": f"{i}?", "answer": f"{i}", "split": "train" if i < 3 else "test"}
        for i in range(20)
    ]
    path = write(tmp_path / "data.jsonl", *records)
    assert [problem.answer for problem in read(path)] == [str(i) for i in range(3, 20)]
    drawn = key(read(path, num=5, seed=1))
    assert drawn == key(read(path, num=5, seed=1))
    assert drawn != key(read(path, num=5, seed=2))
    assert len(drawn) == 5


def test_training_poses_the_records_that_are_not_held_out_equal_ones_too(tmp_path: Path) -> None:
    records = [
        {"id": f"r{at}", "question": "same?", "answer": "1", "split": split}
        for at, split in enumerate(["train", "test", "train", "validation"])
    ]
    path = write(tmp_path / "data.jsonl", *records)
    trained = read_problems(path, num=9, seed=0, is_training=True)
    assert [problem.id for problem in trained] == ["r0", "r2"]
    assert [problem.id for problem in read(path)] == ["r1", "r3"]
    bare = write(tmp_path / "bare.jsonl", *({**record, "split": "train"} for record in records))
    both = read_problems(bare, num=9, seed=0, is_training=True), read(bare)
    assert [len(problems) for problems in both] == [4, 4]


def test_data_that_are_all_held_out_are_not_trained_on(tmp_path: Path) -> None:
    records = [{"question": f"{i}?", "answer": f"{i}", "split": "test"} for i in range(3)]
    path = write(tmp_path / "data.jsonl", *records)
    assert len(read(path)) == 3
    with pytest.raises(InputError, match="expected records to train on, got 3 that are all held"):
        read_problems(path, num=9, seed=0, is_training=True)


def test_more_examples_than_are_needed_are_drawn_by_the_seed(tmp_path: Path) -> None:
    records = [{"question": f"{i}?", "answer": f"{i}"} for i in range(40)]
    path = write(tmp_path / "data.jsonl", *records)
    [one, again, other] = (
        [each.answer for each in read_examples(path, num=3, seed=seed, posed=[])]
        for seed in (0, 0, 1)
    )
    assert one == again != other
    assert ["0", "1", "2"] not in (one, other)


def test_a_question_is_no_example_for_itself_in_other_spaces_or_case(tmp_path: Path) -> None:
    posed = {"question": "What is 2+2?", "answer": "4", "split": "held-out"}
    others = [{"question": text, "answer": "4"} for text in ("What is  2+2? ", "what is 2+2?")]
    path = write(tmp_path / "a.jsonl", posed, *others, {"question": "And 3+3?", "answer": "6"})
    shown = read_examples(path, num=1, seed=0, posed=read(path))
    assert [each.question for each in shown] == ["And 3+3?"]
    [problem] = read(path)
    copies = [replace(problem, question=each["question"]) for each in others]
    arm = Arm(name="few-shot:2", model="base", shots=2)
    assert len(arm.make_prompt(problem, [*copies, *shown])) == 3


def test_an_answer_beside_a_completion_is_what_is_right(tmp_path: Path) -> None:
    worked = {
        "prompt": "2 + 2?",
        "completion": "I add 2 and 2, which is 4, and so on.",
        "answer": "4",
    }
    [problem] = read(write(tmp_path / "a.jsonl", worked))
    assert (problem.answer, problem.rule.name) == ("4", "last-number")


def test_answers_in_several_units_are_compared_with_them(tmp_path: Path) -> None:
    rows = [{"question": f"{at}?", "answer": text} for at, text in enumerate(["7 am", "7 pm"])]
    morning, evening = read(write(tmp_path / "a.jsonl", *rows))
    assert morning.rule.name == "end"
    assert morning.is_right("It leaves at 7 AM.")
    assert not evening.is_right("It leaves at 7 AM.")
    rows = [{"question": f"{at}?", "answer": f"{at} legs"} for at in range(2)]
    assert read(write(tmp_path / "b.jsonl", *rows))[0].rule.name == "last-number"


@pytest.mark.parametrize("given", ["\ud800", ["a"], True])
def test_an_id_that_no_file_can_keep_is_refused(given: Any, tmp_path: Path) -> None:  # noqa: ANN401
    path = write(tmp_path / "a.jsonl", {"id": given, "question": "2 + 2?", "answer": "4"})
    with pytest.raises(InputError, match="id"):
        read(path)


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(InputError, match="expected a task, or a file of problems, got an empty"):
        read("")


def test_examples_are_records_for_training(tmp_path: Path) -> None:
    records = [
        {"question": f"{i}?", "answer": f"{i}", "split": "train" if i < 3 else "test"}
        for i in range(20)
    ]
    path = write(tmp_path / "data.jsonl", *records)
    shown = read_examples(path, num=3, seed=0, posed=read(path))
    assert [problem.answer for problem in shown] == ["0", "1", "2"]  # few: in their order
    with pytest.raises(InputError, match="expected 4 solved problems"):
        read_examples(path, num=4, seed=0, posed=read(path))
    bare = write(tmp_path / "bare.jsonl", *records[:3])
    with pytest.raises(InputError, match="besides those that are posed, got 1"):
        read_examples(bare, num=2, seed=0, posed=read(bare)[:2])


@pytest.mark.parametrize(
    ("answers", "rule"),
    [
        (["12", "$1,000"], "last-number"),
        (["It is \\boxed{a}", "\\boxed{2}"], "boxed"),
        (["Tom has 3 apples, eats 1.\n#### 2"] * 2, "last-number"),
        (["blue", "12"], "end"),
    ],
)
def test_a_rule_is_chosen_from_the_right_answers(
    answers: list[str], rule: str, tmp_path: Path
) -> None:
    records = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    problems = read(write(tmp_path / "data.jsonl", *records))
    assert {problem.rule.name for problem in problems} == {rule}
    assert all(problem.is_right(problem.answer) for problem in problems)


@pytest.mark.parametrize(
    ("record", "rule", "text"),
    [
        ({"text": "a story"}, "auto", "expected messages, or question or prompt or problem"),
        ({"question": "why?"}, "auto", "expected messages, or answer"),
        ({"question": "why?", "answer": "blue"}, "last-number", "expects an answer with a number"),
        ({"question": "why?", "answer": " "}, "end", "expects an answer"),
        ({"question": " \n", "answer": "1"}, "auto", "data.jsonl:1: question: expected some text"),
        (
            {"question": "why?", "answer": "3 + 4\n#### 7"},
            "after:Answer:",
            "rule: after:Answer: finds nothing in any of the 1 right answers, such as '3 \\+ 4",
        ),
        ({"question": "why?", "answer": "1"}, "task", "expects a task of reasoning-gym"),
        ({"question": "why?", "answer": ["1"]}, "auto", "answer"),
        ({"messages": [{"role": "user", "content": "why?"}]}, "auto", "then an assistant's answer"),
    ],
)
def test_data_without_problems_are_refused(
    record: dict[str, Any], rule: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "data.jsonl", record)
    with pytest.raises(InputError, match=text) as caught:
        read(path, rule=rule)
    assert "\n" not in str(caught.value)


def test_right_answers_in_which_a_rule_finds_nothing_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = ["3 + 4 = 7\n#### 7", "So the answer is 7.", "a\nb"]
    records = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    path = write(tmp_path / "data.jsonl", *records)
    assert read(path, rule="after:####")[2].is_right("#### a b")  # bare answers are compared whole
    assert (
        "after:#### finds nothing in 1 of 3 right answers, such as 'So the answer is 7.'"
        in caplog.text
    )
    caplog.clear()
    read(path, rule="end")
    assert not caplog.text


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CarryOnError, match=r"none.jsonl: no such file"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CarryOnError, match=r"empty.jsonl: expected problems, got none"):
        read(str(tmp_path / "empty.jsonl"))
