"""`carryon generate`: an answer of the customized model, and of its base beside it."""

import textwrap
from itertools import zip_longest
from typing import Any

from carryon.cache.spec import ForwardSettings

COLUMN = 46
"""Characters in each of two columns."""


def generate(
    *,
    carryon: str,
    prompt: str,
    base: str | None = None,
    alpha: float | None = None,
    compare: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Answer a prompt with base and carry-on together.

    The answer goes to stdout as it is made. With --compare the base's own answer (alpha 0)
    stands beside it.

    Example:
        carryon generate --carryon run/carryon --prompt "Tom has 3 apples and eats 1. And now?"

    Args:
        carryon: Folder of the carry-on.
        prompt: Text to answer.
        base: The base: hub id, folder or .gguf file. Default: where it was at extraction.
        alpha: Strength of the correction: 0 is the base, 1 what was trained. Default: as the
            carry-on's own file says.
        compare: Show the answer of the base alone too.
        max_new_tokens: Longest answer, in tokens.
        temperature: Temperature of sampling; 0 takes always the likeliest token.
        top_p: Sampling keeps the likeliest tokens up to this sum of probabilities.
        seed: Seed of sampling.
        chat: Put the prompt into the base's chat template, as a user's turn.
        forward: How the base is run.
    """
    from transformers import TextStreamer

    from carryon.train.compose import CarryOnForCausalLM
    from carryon.train.generate import GenerateSettings, answer

    settings = GenerateSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )
    model = CarryOnForCausalLM.from_pretrained(carryon, base=base, forward=forward)
    if not compare:
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = answer(model, prompt, settings=settings, alpha=alpha, streamer=streamer)
        return {"answer": text}
    answers = {
        "base_answer": answer(model, prompt, settings=settings, alpha=0.0),
        "answer": answer(model, prompt, settings=settings, alpha=alpha),
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
