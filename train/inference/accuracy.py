"""Exact match: the fraction of problems with one right answer that a model solves.

`exact`: the answer is the right one and nothing else, as a carry-on trained on bare answers gives
it. `generous`: the answer's last number, or its end, is right; for a base, which is not told how to
answer.
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
    """Fractions of problems that a model solved, and its answers."""

    exact: float
    generous: float
    texts: list[str]


def make_problems(task: str, *, num: int, seed: int) -> list[Problem]:
    """Return problems of reasoning-gym.

    Args:
        task: name of a data set, or with settings of it `chain_sum:min_terms=2,max_terms=2`.
        num: number of problems.
        seed: seed of their generator.

    Raises:
        InputError: there is no such task, or it lacks one of the settings.
        MissingExtraError: the package reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", extra="demo", purpose="a task of reasoning-gym")
    name, _, text = task.partition(":")
    try:
        settings = dict(_parse_setting(part) for part in text.split(",") if part)
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
    """Let `model` answer each question, and compare with the right answers.

    The arguments are those of CarryOnForCausalLM.answer; alpha 0 scores the base.
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
    """Return whether an answer is the right one, apart from surrounding space."""
    return text.strip() == right.strip()


def ends_right(text: str, right: str) -> bool:
    """Return whether an answer's last number is the right one.

    If the right answer is not a number: whether the answer ends with it, ignoring case and a final
    full stop.
    """
    expected = _NUMBER.fullmatch(right.strip())
    if expected is None:
        return text.strip().rstrip(".").casefold().endswith(right.strip().rstrip(".").casefold())
    numbers = [Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)]
    return numbers[-1:] == [Decimal(expected[0].replace(",", ""))]


def _parse_setting(part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"{part!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
