"""Text from a customized model: prompts in, answers out.

Prompts take the base's chat template, as its own users would; the answers are repeatable. Letters:
B prompts, T positions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.train.config import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM


def answer(
    model: CarryOnForCausalLM,
    prompt: str,
    *,
    settings: GenerateSettings,
    alpha: float | None = None,
    streamer: Any = None,  # noqa: ANN401 -- a streamer of transformers
) -> str:
    """Return the text with which `model` goes on after `prompt`, without special tokens.

    Args:
        model: the customized model.
        prompt: any text but an empty one.
        settings: length, sampling, chat template.
        alpha: strength of the correction; 0 is the base alone. None: the carry-on's own.
        streamer: gets the tokens as they come; see transformers' TextStreamer.

    Raises:
        InputError: an empty prompt, one too long for the base, or alpha out of range.
    """
    return _answer_batch(model, [prompt], settings=settings, alpha=alpha, streamer=streamer)[0]


def answers(
    model: CarryOnForCausalLM,
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    batch_rows: int,
    alpha: float | None = None,
    carryons: Sequence[str | None] | None = None,
) -> list[str]:
    """Return the answer to each prompt; prompts of like length are answered together.

    Args:
        model: the customized model.
        prompts: as in `answer`.
        settings: as in `answer`; sampling begins anew from its seed in each batch.
        batch_rows: prompts that are answered together, at most.
        alpha: as in `answer`.
        carryons: for each prompt the name of its carry-on, or None; see `generate` of the model.

    Raises:
        InputError: as `answer`.
    """
    found: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_rows):
        chosen = order[first : first + batch_rows]
        texts = _answer_batch(
            model,
            [prompts[index] for index in chosen],
            settings=settings,
            alpha=alpha,
            carryons=None if carryons is None else [carryons[index] for index in chosen],
        )
        for index, text in zip(chosen, texts, strict=True):
            found[index] = text
    return found


def generate_text(
    carryon_folder: str | Path,
    prompt: str,
    *,
    base: str | Base | None = None,
    settings: GenerateSettings | None = None,
    forward: ForwardSettings | None = None,
    alpha: float | None = None,
    streamer: Any = None,  # noqa: ANN401 -- a streamer of transformers
) -> str:
    """Load a carry-on with its base and return its answer; see `from_pretrained` and `answer`."""
    model = CarryOnForCausalLM.from_pretrained(carryon_folder, base=base, forward=forward)
    settings = settings or GenerateSettings()
    return answer(model, prompt, settings=settings, alpha=alpha, streamer=streamer)


def pad_left(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T] int64 of rows that all end at the same place, and their mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[number, longest - len(row) :] = 1
    return tokens, mask


def _answer_batch(
    model: CarryOnForCausalLM,
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    alpha: float | None,
    carryons: Sequence[str | None] | None = None,
    streamer: Any = None,  # noqa: ANN401
) -> list[str]:
    rows = [_encode(model, prompt, is_chat=settings.chat) for prompt in prompts]
    longest = max(len(row) for row in rows)
    room = model.identity.context_tokens - settings.max_new_tokens
    if longest > room:
        raise InputError(
            f"prompt: expected at most {room} tokens, so that {settings.max_new_tokens} new ones "
            f"fit in the base's {model.identity.context_tokens}, got {longest}"
        )
    config = _generation_config(model, settings)
    tokens, mask = pad_left(rows, pad=config.pad_token_id or 0)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        output = model.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            carryons=carryons,
            alpha=alpha,
            streamer=streamer,
        )
    texts: list[str] = model.tokenizer.batch_decode(
        output[:, tokens.shape[1] :], skip_special_tokens=True
    )
    return texts


def _generation_config(model: CarryOnForCausalLM, settings: GenerateSettings) -> Any:  # noqa: ANN401
    own: Any = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else model.tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    # A fresh config: a base's own one may sample, or hold settings that greedy search complains of.
    make_config: Any = GenerationConfig
    return make_config(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
        **sampling,
    )


def _encode(model: CarryOnForCausalLM, prompt: str, *, is_chat: bool) -> list[int]:
    """Return the token ids of a prompt."""
    if is_chat and model.tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}]
        text = model.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = model.tokenizer(prompt).input_ids
    if not prompt or not ids:
        raise InputError("prompt: expected some text, got none")
    return ids
