"""Answers on disk: appended, cut off, damaged, or of other settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.train.inference.scoring import answer_file
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile

ANSWER = Answer(
    task="t",
    arm="base",
    model="m",
    id="1",
    sample=0,
    question="2 + 2?",
    right="4",
    text="four \u2028",
    is_right=False,
    tokens=3,
    is_cut=False,
    seconds=1,
)
OTHER = replace(ANSWER, id="2")
SETTINGS = {"seed": 0, "max_new_tokens": 4}


def test_answers_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    file = AnswerFile(path, SETTINGS)
    file.append([ANSWER])
    file.append([OTHER])
    assert AnswerFile(path, SETTINGS).answers == {ANSWER.key: ANSWER, OTHER.key: OTHER}
    assert len(path.read_text().splitlines()) == 3


def test_a_line_that_was_cut_off_is_removed_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, SETTINGS).append([ANSWER, OTHER])
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        file = AnswerFile(path, SETTINGS)
        assert len(file.answers) == max(content[:size].count(b"\n") - 1, 0)
        file.append([ANSWER, OTHER])
        assert len(AnswerFile(path, SETTINGS).answers) == 2


def test_new_verdicts_replace_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, SETTINGS)
    file.append([ANSWER, OTHER])
    file.replace([replace(ANSWER, is_right=True)])
    again = AnswerFile(path, SETTINGS)
    assert [answer.is_right for answer in again.answers.values()] == [True, False]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"id": 1}\n', "expected answers of carryon score"),
        (b"[]\n", ":1: expected an answer"),
        (b'{"my": "notes"}', ":1: expected an answer"),  # no end of line: json.dump writes none
        (b"notes", ":1: expected an answer"),
        (b"\xff\n", ":1: expected an answer"),
        (b'{"format": 1, "settings": {"seed": 1, "max_new_tokens": 4}}\n', "seed: expected 0"),
        (b'{"format": 1, "settings": {"seed": 0, "max_new_tokens": 4}}\n{}\n', ":2: expected an"),
        (b'{"format": 1, "settings": {"seed": 0, "max_new_tokens": 4, "x": 1}}\n', "x: expected"),
    ],
)
def test_another_file_is_refused_and_kept(content: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=text) as caught:
        AnswerFile(path, SETTINGS)
    assert "Fix: another --out" in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", -5), ("tokens", 10**400), ("tokens", True), ("seconds", -1), ("sample", -1),
     ("seconds", 1e300), ("text", None)],
)  # fmt: skip
def test_an_answer_with_impossible_values_is_refused(
    name: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, SETTINGS).append([ANSWER])
    head, line = path.read_text().splitlines()
    path.write_text(f"{head}\n{json.dumps({**json.loads(line), name: value})}\n")
    with pytest.raises(InputError, match=":2: expected an answer"):
        AnswerFile(path, SETTINGS)


def test_a_line_too_long_loses_none_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, SETTINGS).append([replace(ANSWER, text="x" * 2000), OTHER])
    content = path.read_bytes()
    monkeypatch.setattr(answer_file, "MAX_LINE_BYTES", 1000)
    with pytest.raises(InputError, match=":2: expected an answer"):
        AnswerFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_answers_of_older_files_have_no_digest_of_their_prompt(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, SETTINGS).append([ANSWER])
    path.write_text(path.read_text().replace(', "prompt": ""', ""))
    assert AnswerFile(path, SETTINGS).answers == {ANSWER.key: ANSWER}


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file for answers, got the folder"):
        AnswerFile(tmp_path, SETTINGS)
