"""The demo's corpus: GSM-symbolic problems with worked answers, as conversations.

Training problems come from one seed of the generator, held-out problems from another. Both are
made on this machine, so nothing is downloaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files import write_file
from carryon.cache.optional import require

TRAINING_SEED = 1
HELD_OUT_SEED = 2
REQUEST = " Give the result as your final answer. Do not include units."
"""End of every question; left out, since the worked answers do neither."""


def count_held_out(num_samples: int) -> int:
    """Return how many held-out problems go with `num_samples` training problems."""
    return 200 if num_samples >= 1000 else max(8, num_samples // 5)


def make_corpus(num_samples: int) -> Iterator[dict[str, Any]]:
    """Yield `num_samples` training records, then the held-out ones.

    A record has an id, two messages (the question, the worked answer) and its split.

    Raises:
        MissingExtraError: the package reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", extra="demo", purpose="the demo's corpus")
    parts = [
        ("train", TRAINING_SEED, num_samples),
        ("held-out", HELD_OUT_SEED, count_held_out(num_samples)),
    ]
    for split, seed, size in parts:
        problems = gym.create_dataset("gsm_symbolic", size=size, seed=seed)
        for index, problem in enumerate(problems):
            messages = [
                {"role": "user", "content": problem["question"].removesuffix(REQUEST)},
                {"role": "assistant", "content": problem["metadata"]["answer_cot"]},
            ]
            yield {"id": f"{split}-{index}", "messages": messages, "split": split}


def write_corpus(path: Path, num_samples: int) -> None:
    """Write the corpus to `path` as JSON lines."""
    lines = [json.dumps(record) + "\n" for record in make_corpus(num_samples)]
    write_file(path, "".join(lines).encode())


def check_corpus(path: Path, num_samples: int) -> None:
    """Check that the corpus at `path` is one of `num_samples`.

    Raises:
        InputError: it has another number of problems.
    """
    expected = num_samples + count_held_out(num_samples)
    with path.open("rb") as file:
        found = sum(1 for _ in file)
    if found != expected:
        raise InputError(
            f"{path}: expected {num_samples} + {expected - num_samples} held-out problems, got "
            f"{found}: give the --samples it was made with, or another --out"
        )
