"""Text from a customized model: a prompt in, the answer out.

Prompts take the base's chat template, as its own users would; the answer is repeatable. Letters:
T positions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from carryon.cache.base import Base
from carryon.cache.errors import InputError
from carryon.cache.spec import ForwardSettings
from carryon.train.compose import CarryOnForCausalLM, check_alpha


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings:
    """How text is generated."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Temperature of sampling. 0: always the likeliest token."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens up to this sum of probabilities."""
    seed: int = 0
    """Seed of sampling."""
    chat: bool = True
    """Put the prompt into the base's chat template, as a user's turn; a base without a template
    gets the prompt as it is."""

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        problems = [
            (
                self.max_new_tokens < 1,
                f"max_new_tokens: expected 1 or more, got {self.max_new_tokens}",
            ),
            (not self.temperature >= 0, f"temperature: expected 0 or more, got {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p: expected more than 0, up to 1, got {self.top_p}"),
            (self.seed < 0, f"seed: expected 0 or more, got {self.seed}"),
        ]
        found = [text for is_wrong, text in problems if is_wrong]
        if found:
            raise InputError("; ".join(found))


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
    token_ids = _encode(model, prompt, is_chat=settings.chat)
    room = model.identity.context_tokens - settings.max_new_tokens
    if token_ids.shape[1] > room:
        raise InputError(
            f"prompt: expected at most {room} tokens, so that {settings.max_new_tokens} new ones "
            f"fit in the base's {model.identity.context_tokens}, got {token_ids.shape[1]}"
        )
    own = model.generation_config
    eos = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else model.tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if settings.temperature > 0:
        sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    # A fresh config: a base's own one may sample, or hold settings that greedy search complains of.
    make_config: Any = GenerationConfig
    config = make_config(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
        **sampling,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        untyped: Any = model
        output = untyped.generate(
            token_ids.to(model.device),
            attention_mask=torch.ones_like(token_ids).to(model.device),
            generation_config=config,
            alpha=model.alpha if alpha is None else check_alpha(alpha),
            streamer=streamer,
        )
    new_ids = output[0, token_ids.shape[1] :]
    return str(model.tokenizer.decode(new_ids, skip_special_tokens=True))


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


def _encode(model: CarryOnForCausalLM, prompt: str, *, is_chat: bool) -> Tensor:
    """Return the token ids of a prompt, [1, T] int64."""
    if is_chat and model.tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}]
        text = model.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = model.tokenizer(prompt).input_ids
    if not prompt or not ids:
        raise InputError("prompt: expected some text, got none")
    return torch.tensor([ids], dtype=torch.int64)
