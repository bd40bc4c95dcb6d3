"""Generate answers with a customized model: prompts to token ids and back.

Prompts are put into the base's chat template. The same prompts, settings and batches give the same
answers. Letters: B prompts, T positions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from carryon.cache.errors import InputError
from carryon.train.config import GenerateSettings

if TYPE_CHECKING:
    from carryon.train.inference.modeling import CarryOnForCausalLM


def answers(
    model: "CarryOnForCausalLM",
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    batch_rows: int,
    alpha: float | None,
    carryons: Sequence[str | None] | None,
    streamer: Any,  # noqa: ANN401
) -> list[str]:
    """Return the answer to each prompt, without special tokens; see CarryOnForCausalLM.answer.

    Prompts of similar length share a batch. Sampling restarts from its seed in each batch.
    """
    texts: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_rows):
        batch = order[first : first + batch_rows]
        batch_texts = _answer_batch(
            model,
            [prompts[index] for index in batch],
            settings=settings,
            alpha=alpha,
            carryons=None if carryons is None else [carryons[index] for index in batch],
            streamer=streamer,
        )
        for index, text in zip(batch, batch_texts, strict=True):
            texts[index] = text
    return texts


def pad_left(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both [B, T] int64, with the padding on the left."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[number, longest - len(row) :] = 1
    return tokens, mask


def _answer_batch(
    model: "CarryOnForCausalLM",
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    alpha: float | None,
    carryons: Sequence[str | None] | None,
    streamer: Any,  # noqa: ANN401
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


def _generation_config(model: "CarryOnForCausalLM", settings: GenerateSettings) -> Any:  # noqa: ANN401
    own: Any = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else model.tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    # A new config: the base's may sample, or hold settings that greedy search warns about.
    make_config: Any = GenerationConfig
    return make_config(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
        **sampling,
    )


def _encode(model: "CarryOnForCausalLM", prompt: str, *, is_chat: bool) -> list[int]:
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
