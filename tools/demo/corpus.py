"""The demo's corpus: GSM-symbolic problems with worked answers, as conversations.

Training and held-out problems come from seeds of the generator that are a million apart, and no
held-out problem repeats a training problem. Nothing is downloaded.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from carryon.cache.corpus.records import refuse_shared_texts
from carryon.cache.errors import InputError
from carryon.cache.files import write_file
from carryon.cache.optional import require

TRAINING_SEED = 1
HELD_OUT_SEED = 1_000_001
REQUEST = " Give the result as your final answer. Do not include units."
"""End of every question; removed, since the worked answers do neither."""


def count_held_out(num_samples: int) -> int:
    """Return the number of held-out problems beside `num_samples` training problems."""
    return 200 if num_samples >= 1000 else max(8, num_samples // 5)


def make_corpus(num_samples: int) -> list[dict[str, Any]]:
    """Return `num_samples` training records, then the held-out ones.

    A record has an id, two messages (the question, the worked answer) and its split.

    Raises:
        MissingExtraError: the package reasoning-gym is not installed.
    """
    num_held_out = count_held_out(num_samples)
    train = list(_make_problems(TRAINING_SEED, num_samples))
    # The generator has 100 templates: a few problems are equal however far apart the seeds are.
    questions = {question["content"] for question, _ in train}
    spare = _make_problems(HELD_OUT_SEED, 2 * num_held_out)
    held_out = list(
        islice((each for each in spare if each[0]["content"] not in questions), num_held_out)
    )
    halves = [
        [
            {"id": f"{split}-{index}", "messages": messages, "split": split}
            for index, messages in enumerate(problems)
        ]
        for split, problems in (("train", train), ("held-out", held_out))
    ]
    refuse_shared_texts(*halves)
    return [*halves[0], *halves[1]]


def _make_problems(seed: int, size: int) -> Iterator[list[dict[str, str]]]:
    """Yield problems as messages: the question, the worked answer."""
    gym = require("reasoning_gym", extra="demo", purpose="the demo's corpus")
    for problem in gym.create_dataset("gsm_symbolic", size=size, seed=seed):
        yield [
            {"role": "user", "content": problem["question"].removesuffix(REQUEST)},
            {"role": "assistant", "content": problem["metadata"]["answer_cot"]},
        ]


def write_corpus(path: Path, num_samples: int) -> None:
    """Write the corpus to `path` as JSON lines."""
    lines = [json.dumps(record) + "\n" for record in make_corpus(num_samples)]
    write_file(path, "".join(lines).encode())


def check_corpus(path: Path, num_samples: int) -> None:
    """Check that the corpus at `path` has `num_samples` training problems.

    Raises:
        InputError: it has another number of problems.
    """
    num_held_out = count_held_out(num_samples)
    with path.open("rb") as file:
        num_problems = sum(1 for _ in file)
    if num_problems != num_samples + num_held_out:
        raise InputError(
            f"{path}: expected {num_samples} + {num_held_out} held-out problems, got "
            f"{num_problems}. Fix: give the --samples of the first run, or another --out"
        )
