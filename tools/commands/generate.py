"""`carryon generate`: an answer of the customized model, and of its base beside it."""

import textwrap
from itertools import zip_longest
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.train.config import GenerateSettings

COLUMN = 46
"""Characters in each of two columns."""


def generate(
    *,
    carryon: str,
    prompt: str,
    base: str | None = None,
    alpha: float | None = None,
    compare: bool = False,
    settings: GenerateSettings,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Answer a prompt with base and carry-on together.

    The answer goes to stdout as it is made. With --compare the base's own answer (alpha 0)
    stands beside it.

    Example:
        carryon generate --carryon run/carryon --prompt "Tom has 3 apples and eats 1. And now?"

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        prompt: Text to answer.
        base: The base: hub id, folder or .gguf file. Default: where it was at extraction.
        alpha: Strength of the correction: 0 is the base, 1 what was trained. Default: as the
            carry-on's own file says.
        compare: Show the answer of the base alone too.
        settings: How text is generated.
        forward: How the base is run.
    """
    from transformers import TextStreamer

    from carryon.train.inference.modeling import CarryOnForCausalLM

    model = CarryOnForCausalLM.from_pretrained(carryon, base=base, forward=forward)
    if not model.carryons.names and (compare or alpha not in (None, 1.0)):
        raise InputError(
            f"{carryon}: expected neither --compare nor --alpha for a carry-on of the kind native "
            "or top, which is merged into its base: generate with a bottleneck to compare"
        )
    if not compare:
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = model.answer(prompt, settings=settings, alpha=alpha, streamer=streamer)
        return {"answer": text}
    answers = {
        "base_answer": model.answer(prompt, settings=settings, alpha=0.0),
        "answer": model.answer(prompt, settings=settings, alpha=alpha),
    }
    strength = model.alpha if alpha is None else alpha
    print(
        side_by_side(
            ["base", *_wrap(answers["base_answer"])],
            [f"base + carry-on (alpha {strength:g})", *_wrap(answers["answer"])],
        )
    )
    return answers


def side_by_side(left: list[str], right: list[str]) -> str:
    """Return two columns of lines; the first line of each is its title."""
    rows = [f"{a:<{COLUMN}} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    rows.insert(1, f"{'-' * COLUMN}-+-{'-' * COLUMN}")
    return "\n".join(rows)


def _wrap(text: str) -> list[str]:
    lines = (textwrap.wrap(line, COLUMN) or [""] for line in text.strip().splitlines())
    return [part for line in lines for part in line]
