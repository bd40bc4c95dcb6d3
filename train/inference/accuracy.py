"""Exact match: how many problems with one right answer a model solves by generating.

An answer is judged twice. Strictly: it is the right answer and nothing else, as a carry-on that was
trained on bare answers gives it. Generously: its last number, or its end, is the right answer, as a
base deserves that nobody told how to answer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.train.config import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with one right answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How a model did."""

    exact: float
    """Part of the problems whose answer is the right one and nothing else."""
    generous: float
    """Part of the problems whose answer ends with the right one."""
    texts: list[str]
    """All answers."""


def make_problems(task: str, *, num: int, seed: int) -> list[Problem]:
    """Return problems of reasoning-gym.

    Args:
        task: a data set's name, or with settings of it `chain_sum:min_terms=2,max_terms=2`.
        num: how many.
        seed: of its generator.

    Raises:
        InputError: there is no such task, or not with these settings.
        MissingExtraError: the package reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", extra="demo", purpose="a task of reasoning-gym")
    name, _, text = task.partition(":")
    try:
        settings = dict(_setting(part) for part in text.split(",") if part)
        problems: Any = gym.create_dataset(name, size=num, seed=seed, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"task {task!r}: expected a task of reasoning-gym such as chain_sum, or with settings "
            f"chain_sum:min_terms=2,max_terms=2: {error}"
        ) from error
    return [Problem(question=item["question"], answer=str(item["answer"])) for item in problems]


def score(
    model: CarryOnForCausalLM,
    problems: Sequence[Problem],
    *,
    settings: GenerateSettings,
    batch_rows: int,
    alpha: float | None = None,
) -> Score:
    """Let `model` answer each question and judge the answers.

    Args:
        model: the customized model.
        problems: at least one.
        settings: how answers are generated.
        batch_rows: questions that are answered together, at most.
        alpha: strength of the correction; 0 is the base alone. None: the carry-on's own.
    """
    questions = [problem.question for problem in problems]
    texts = model.answer(questions, settings=settings, batch_rows=batch_rows, alpha=alpha)
    pairs = list(zip(texts, (problem.answer for problem in problems), strict=True))
    return Score(
        exact=sum(is_exact(text, right) for text, right in pairs) / len(pairs),
        generous=sum(ends_right(text, right) for text, right in pairs) / len(pairs),
        texts=texts,
    )


def is_exact(text: str, right: str) -> bool:
    """Return whether an answer is the right one, but for space around it."""
    return text.strip() == right.strip()


def ends_right(text: str, right: str) -> bool:
    """Return whether the last number of an answer is the right one; where that is no number,
    whether the answer ends with it, but for case and a full stop."""
    expected = _NUMBER.fullmatch(right.strip())
    if expected is None:
        return text.strip().rstrip(".").casefold().endswith(right.strip().rstrip(".").casefold())
    numbers = _NUMBER.findall(text)
    return bool(numbers) and _value(numbers[-1]) == _value(expected[0])


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _setting(part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"{part!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
