"""Generate answers with a customized model: prompts to token ids and back.

The same prompts, settings and batches give the same answers. Letters: B prompts, T positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig

from carryon.cache.base.facts import check_token_id, end_ids
from carryon.cache.errors import InputError
from carryon.train.inference.draw import sampling_processors
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.prefill import arrange, prefill
from carryon.train.inference.prompts import encode_prompts, with_variables
from carryon.train.inference.single_queries import packed_heads

if TYPE_CHECKING:
    from carryon.train.inference.modeling import CarryOnForCausalLM


STAGE_TOKENS = 24
"""New tokens between two looks at which rows of a batch have ended."""
_SOURCE_TEXTS = "source_texts"
"""The prompts of a batch as the other bases of a mixture read them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """An answer."""

    text: str
    """Without special tokens."""
    num_tokens: int
    """New tokens, the one that ended it included."""
    is_cut: bool
    """Whether it was ended by the limit of new tokens."""


def answer_all(
    model: "CarryOnForCausalLM",
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    batch_rows: int,
    carryons: Sequence[str | None] | None,
    **generation: Any,  # noqa: ANN401
) -> list[str]:
    """Return the answer to each prompt; prompts of about equal length are in one batch.

    `generation` is passed on to CarryOnForCausalLM.generate; the rest is as in its `answer`.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # less padding
    for first in range(0, len(order), batch_rows):
        rows = order[first : first + batch_rows]
        batch = answer_batch(
            model,
            [prompts[row] for row in rows],
            settings=settings,
            carryons=None if carryons is None else [carryons[row] for row in rows],
            **generation,
        )
        for row, text in zip(rows, batch, strict=True):
            answers[row] = text
    return answers


def answer_batch(
    model: "CarryOnForCausalLM",
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    **generation: Any,  # noqa: ANN401
) -> list[str]:
    """Return the answer to each prompt, without special tokens, all generated in one batch.

    `generation` is passed on to CarryOnForCausalLM.generate.

    Raises:
        InputError: an empty prompt, or one too long for the base.
    """
    rows = _encode(model, prompts, settings=settings, carryons=generation.get("carryons"))
    check_room(rows, settings=settings, context_tokens=model.identity.context_tokens)
    generation |= model.read_prompts(prompts, chat=settings.chat)
    return [each.text for each in generate_rows(model, rows, settings=settings, **generation)]


def check_room(
    rows: Sequence[Sequence[int]], *, settings: GenerateSettings, context_tokens: int
) -> None:
    """Check that prompts and new tokens fit in the base's context.

    Raises:
        InputError: they do not; the text has the longest prompt.
    """
    longest, room = max(map(len, rows)), context_tokens - settings.max_new_tokens
    if longest > room:
        raise InputError(
            f"prompt: expected at most {room} tokens, so that {settings.max_new_tokens} new ones "
            f"fit in the base's {context_tokens}, got {longest}"
        )


def generate_rows(
    model: "CarryOnForCausalLM",
    rows: Sequence[Sequence[int]],
    *,
    settings: GenerateSettings,
    **generation: Any,  # noqa: ANN401
) -> list[Generation]:
    """Return the answer to each prompt, given as token ids, all generated in one batch.

    `generation` is passed on to CarryOnForCausalLM.generate.
    """
    config = _generation_config(model, settings)
    processors: Any = None
    if settings.temperature > 0:
        processors = sampling_processors(temperature=settings.temperature, top_p=settings.top_p)
    with torch.random.fork_rng(), _no_defaults(model), packed_heads():
        torch.manual_seed(settings.seed)
        new = _generate(model, rows, config=config, processors=processors, generation=generation)
    texts: list[str] = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [
        Generation(
            text=text,
            num_tokens=len(tokens),
            is_cut=tokens[-1] not in _ends(config) and len(tokens) >= settings.max_new_tokens,
        )
        for text, tokens in zip(texts, new, strict=True)
    ]


def _generate(
    model: "CarryOnForCausalLM",
    rows: Sequence[Sequence[int]],
    *,
    config: Any,  # noqa: ANN401
    processors: Any,  # noqa: ANN401
    generation: dict[str, Any],
) -> list[list[int]]:
    """Return the new tokens of each row, the one that ended it included.

    What prompts share is read once. Rows that have ended leave the batch every STAGE_TOKENS: most
    answers are far shorter than the longest one. All stay to the end, and are read whole, where
    their carry-ons or other settings may differ by row.
    """
    generation = {name: value for name, value in generation.items() if value is not None}
    names, alpha = generation.pop("carryons", None), generation.pop("alpha", None)
    is_staged = (
        set(generation) <= {_SOURCE_TEXTS}  # which only the first stage reads
        and (names is None or len(set(names)) == 1)
        and (alpha is None or isinstance(alpha, (int, float)))
    )
    new: list[list[int]] = [[] for _ in rows]
    batch, ends = list(range(len(rows))), _ends(config)
    going, num_left = set(batch), config.max_new_tokens
    stage = STAGE_TOKENS if is_staged else num_left
    config.return_dict_in_generate = True

    def go_on(tokens: Tensor, mask: Tensor, cache: Any, num_new: int, **options: Any) -> Any:  # noqa: ANN401
        config.max_new_tokens = num_new
        return model.generate(
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
            past_key_values=cache,
            carryons=list(names)[: len(tokens)] if names is not None else None,
            alpha=alpha,
            **options,
        )

    def read(tokens: Tensor, mask: Tensor, cache: Any) -> Any:  # noqa: ANN401
        with torch.random.fork_rng():
            return go_on(tokens, mask, cache, 1).past_key_values

    pad = config.pad_token_id or 0
    cache: Any = None
    if is_staged and model.shares_prompts:
        tokens, mask, cache = prefill(
            rows,
            pad=pad,
            read=read,
            can_share=_is_whole,
        )
    else:
        tokens, mask = arrange(rows, common=0, pad=pad)
    while going and num_left:
        length = tokens.shape[1]
        output: Any = go_on(tokens, mask, cache, min(stage, num_left), **generation)
        generation.pop(_SOURCE_TEXTS, None)
        tokens, mask, cache = output.sequences, mask.to(model.device), output.past_key_values
        num_left -= tokens.shape[1] - length
        for row, made in zip(batch, tokens[:, length:].tolist(), strict=True):
            if row in going:
                stop = next((at for at, each in enumerate(made, 1) if each in ends), None)
                new[row] += made[:stop]
                going -= {row} if stop else set()
        mask = nn.functional.pad(mask, (0, tokens.shape[1] - length), value=1)
        if len(going) < len(batch) and _can_select(cache):
            places = [place for place, row in enumerate(batch) if row in going]
            index = torch.tensor(places, dtype=torch.int64, device=model.device)
            tokens, mask, batch = tokens[index], mask[index], [batch[place] for place in places]
            cache.batch_select_indices(index)
    return new


def _can_select(cache: Any) -> bool:  # noqa: ANN401
    """Tell whether rows of a cache can be taken out; layers of linear attention cannot."""
    return isinstance(cache, Cache) and all(
        hasattr(layer, "batch_select_indices") for layer in cache.layers
    )


def _is_whole(cache: Any) -> bool:  # noqa: ANN401
    """Tell whether a cache keeps every position: padding behind shared ones would fill a window."""
    return _can_select(cache) and not any(
        getattr(layer, "is_sliding", False) for layer in cache.layers
    )


def _ends(config: Any) -> list[int]:  # noqa: ANN401
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


@contextmanager
def _no_defaults(model: "CarryOnForCausalLM") -> Iterator[None]:
    """Keep out what the base recommends, such as a repetition penalty.

    transformers fills in with it whatever a call leaves open; a penalty changes greedy text, and
    hits most an answer that repeats a number it has computed.
    """
    own, make_config = model.generation_config, cast(Any, GenerationConfig)
    model.generation_config = make_config()
    try:
        yield
    finally:
        model.generation_config = own


def _generation_config(model: "CarryOnForCausalLM", settings: GenerateSettings) -> Any:  # noqa: ANN401
    own: Any = model.generation_config
    eos: Any = end_ids(own) or model.tokenizer.eos_token_id
    pad = model.tokenizer.pad_token_id
    if own.pad_token_id is not None:
        pad = check_token_id("pad_token_id", own.pad_token_id)
    # A new config: the base's may sample, or hold settings that greedy search warns about.
    make_config: Any = GenerationConfig
    return make_config(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
        do_sample=False,  # draw.py draws
    )


def _encode(
    model: "CarryOnForCausalLM",
    prompts: Sequence[str],
    *,
    settings: GenerateSettings,
    carryons: Sequence[str | None] | None,
) -> list[list[int]]:
    """Return the token ids of prompts, each framed as the texts of its carry-on were."""
    framings = model.framings(carryons, num_rows=len(prompts))
    rows: dict[int, list[int]] = {}
    for framing in {id(each): each for each in framings}.values():
        indices = [index for index, each in enumerate(framings) if each is framing]
        texts = [prompts[index] for index in indices]
        asked = with_variables(framing, settings)
        encoded = encode_prompts(model.tokenizer, texts, framing=asked, chat=settings.chat)
        rows |= zip(indices, encoded, strict=True)
    return [rows[index] for index in range(len(prompts))]
