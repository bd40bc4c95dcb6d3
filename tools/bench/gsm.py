"""GSM-symbolic problems with worked answers, as conversations: a corpus to measure losses on.

Training and held-out problems come from seeds of the generator that are a million apart, and no
held-out problem repeats a training problem. Nothing is downloaded. The last line of an answer is
in plain words: after the marker of the original, `####`, models of this size write another number
than the one they computed.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from carryon.cache.corpus.records import refuse_shared_texts
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
    train = list(_make_records("train", TRAINING_SEED, num_samples))
    # The generator has 100 templates: a few problems are equal however far apart the seeds are.
    questions = {record["messages"][0]["content"] for record in train}
    spare = _make_records("held-out", HELD_OUT_SEED, 2 * num_held_out)
    others = (record for record in spare if record["messages"][0]["content"] not in questions)
    held_out = list(islice(others, num_held_out))
    refuse_shared_texts(train, held_out)
    return train + held_out


def _make_records(split: str, seed: int, size: int) -> Iterator[dict[str, Any]]:
    gym = require("reasoning_gym", extra="demo", purpose="the corpus gsm")
    for index, problem in enumerate(gym.create_dataset("gsm_symbolic", size=size, seed=seed)):
        messages = [
            {"role": "user", "content": problem["question"].removesuffix(REQUEST)},
            {"role": "assistant", "content": _in_plain_words(problem["metadata"]["answer_cot"])},
        ]
        yield {"id": f"{split}-{index}", "messages": messages, "split": split}


def _in_plain_words(answer: str) -> str:
    work, _, result = answer.partition("\n#### ")
    return f"{work}\nTherefore, the final answer is {result}."
