"""GSM-symbolic problems with worked answers, as conversations: a corpus to measure losses on.

Training and held-out problems come from seeds of the generator that are a million apart, and no
held-out problem repeats a training problem. Nothing is downloaded. The last line of an answer is
in plain words: after the marker of the original, `####`, models of this size write another number
than the one they computed.
"""

from collections.abc import Iterator
from typing import Any

from carryon.cache.optional import require
from carryon.tools.bench.accuracy.chains import in_plain_words
from carryon.tools.demo.corpus import make_halves

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
    return make_halves(_make_records, num_samples, count_held_out(num_samples))


def _make_records(split: str, seed: int, size: int) -> Iterator[dict[str, Any]]:
    gym = require("reasoning_gym", extra="demo", purpose="the corpus gsm")
    for index, problem in enumerate(gym.create_dataset("gsm_symbolic", size=size, seed=seed)):
        messages = [
            {"role": "user", "content": problem["question"].removesuffix(REQUEST)},
            {"role": "assistant", "content": in_plain_words(problem["metadata"]["answer_cot"])},
        ]
        yield {"id": f"{split}-{index}", "messages": messages, "split": split}
