"""The demo's corpus: how many legs have some animals, worked in plain words, as conversations.

The questions are those of reasoning-gym's `leg_counting`. Training and held-out problems come from
seeds of its generator that are a million apart, and no held-out problem repeats a training
problem. Nothing is downloaded.
"""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from carryon.cache.corpus.records import refuse_shared_texts
from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.optional import require

ANIMALS = {"min_animals": 2, "max_animals": 3}
TASK = "leg_counting:" + ",".join(f"{name}={value}" for name, value in ANIMALS.items())
"""As `carryon score --tasks` takes it."""
TRAINING_SEED = 1
HELD_OUT_SEED = 1_000_001
SCORED_SEED = 2_000_001
"""Of the problems that are answered in the end: they are in no half of the corpus."""
ENDING = "Therefore, the final answer is {}."
"""Last line of a worked answer."""


def count_held_out(num_samples: int) -> int:
    """Return the number of held-out problems beside `num_samples` training problems."""
    return min(200, max(8, num_samples // 20))


def make_corpus(num_samples: int) -> list[dict[str, Any]]:
    """Return `num_samples` training records, then the held-out ones.

    A record has an id, two messages (the question, the worked answer) and its split.

    Raises:
        MissingExtraError: the package reasoning-gym is not installed.
    """
    return make_halves(_make_records, num_samples, count_held_out(num_samples))


def make_halves(
    make_records: Callable[[str, int, int], Iterator[dict[str, Any]]],
    num_samples: int,
    num_held_out: int,
) -> list[dict[str, Any]]:
    """Return training records, then held-out ones with other questions.

    Args:
        make_records: called with the split, a seed of the generator and a number of problems.
        num_samples: training problems.
        num_held_out: held-out problems.

    Raises:
        InputError: most held-out problems repeat a training problem.
    """
    train = list(make_records("train", TRAINING_SEED, num_samples))
    # Generators draw a few problems twice, however far apart the seeds are.
    questions = {record["messages"][0]["content"] for record in train}
    spare = make_records("held-out", HELD_OUT_SEED, 2 * num_held_out)
    others = (record for record in spare if record["messages"][0]["content"] not in questions)
    held_out = list(islice(others, num_held_out))
    if len(held_out) < num_held_out:
        raise InputError(
            f"corpus: expected {num_held_out} held-out problems whose question no training problem "
            f"has, got {len(held_out)}. Fix: fewer training problems"
        )
    refuse_shared_texts(train, held_out)
    return train + held_out


def _make_records(split: str, seed: int, size: int) -> Iterator[dict[str, Any]]:
    gym = require("reasoning_gym", extra="demo", purpose="the demo's corpus")
    from reasoning_gym.arithmetic.leg_counting import ANIMALS as LEGS

    problems = gym.create_dataset("leg_counting", size=size, seed=seed, **ANIMALS)
    for index, problem in enumerate(problems):
        answer = work_out(problem["metadata"]["animals"], LEGS)
        messages = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": answer},
        ]
        yield {"id": f"{split}-{index}", "messages": messages, "split": split}


def work_out(animals: dict[str, int], legs: dict[str, int]) -> str:
    """Return the worked answer to a problem.

    Each line takes the sum so far from the end of the line before, so that what is copied is never
    far, and adds tens and ones apart: few words, but steps that a small base can take.

    Args:
        animals: animal -> how many there are.
        legs: animal -> legs of one.
    """
    lines, total = [], 0
    for animal, number in animals.items():
        count = number * legs[animal]
        plural = "s" if number > 1 else ""
        product = f"{number} {animal}{plural}: {number} * {legs[animal]} = {count}"
        lines.append(f"{product}, and {_add(total, count)}.")
        total += count
    lines.append(ENDING.format(total))
    return "\n".join(lines)


def _add(total: int, count: int) -> str:
    ones = count % 10
    tens = count - ones
    if not (total and tens and ones):
        return f"{total} + {count} = {total + count}"
    return f"{total} + {tens} = {total + tens}, {total + tens} + {ones} = {total + count}"


def prepare_corpus(path: Path, num_samples: int) -> None:
    """Write the corpus to `path` as JSON lines, unless it is there.

    Raises:
        InputError: the existing corpus has other problems or answers.
    """
    content = "".join(json.dumps(record) + "\n" for record in make_corpus(num_samples)).encode()
    if not path.exists():
        write_file(path, content)
    elif path.read_bytes() != content:
        raise InputError(
            f"{path}: expected the {num_samples} + {count_held_out(num_samples)} problems of this "
            "version, got others. Fix: give the --samples of the first run, or another --out"
        )
