"""Generation with a mixture: its text with and without a cache, its speed beside its bases.

The first base is the anchor, with a random carry-on; an untrained gate of even shares mixes in the
others. Neither figure depends on what they have learned. Without `--base` the bases are tiny and
random, with different tokenizers.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.corpora import PYTHON, iter_documents
from carryon.tools.bench.families import make_family_base
from carryon.tools.bench.generate import generation_speed
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.random_carryons import MAX_BYTES, make_carryons, make_prompts
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.mixing.composition import Composition
from carryon.train.inference.mixing.modeling import MixedForCausalLM
from carryon.train.inference.mixing.source_base import SourceBase, vocabulary_of
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.vocabulary_map import VocabularyMap

LEAST_SPEED = 0.8
"""Of the tokens/s that the bases take together, one after the other."""
_SPLITS = (r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|\s+|.")
_LENGTHS = (20, 120)
"""Characters of a prompt: at least, at most."""


def measure_mixed_generation(
    job: Job,
    *,
    mix: tuple[str, ...] = ("",),
    prompts: int = 100,
    new_tokens: int = 16,
    prompt_tokens: int = 64,
    batch_sizes: tuple[int, ...] = (1, 8),
    carryon_bytes: int = MAX_BYTES,
    rounds: int = 3,
    dtype: str = "float32",
) -> None:
    """Report identical answers and tokens/s; `mix` names the other bases beside `--base`.

    Raises:
        InputError: one of `--base` and `mix` is given without the other.
    """
    others = [each for each in mix if each]
    if bool(job.base) != bool(others):
        given = "--base" if job.base else "mix"
        raise InputError(
            f"mixing.generation: expected --base and mix, or neither, got {given} alone. Fix: "
            "--base ANCHOR --sizes mix=OTHER"
        )
    places = [job.base, *others] if job.base else _make_bases(job.work)
    forward = ForwardSettings.from_dict({"device": "auto", "compute_dtype": dtype})
    bases = [load_base(place, forward=forward) for place in places]
    texts = _cut_texts(prompts)
    for rows in batch_sizes:
        tokens = [
            make_prompts(base, job.work, num=rows, num_tokens=prompt_tokens).to(base.device)
            for base in bases
        ]
        alone = CarryOnForCausalLM.from_base(bases[0])
        mixed = _mix(bases)
        [(carryon, card)] = make_carryons(
            bases[0], 1, max_bytes=carryon_bytes, tokens=tokens[0][:1]
        )
        for each in (alone, mixed):
            each.carryons.put(DEFAULT, carryon.state_dict(), card)
        same = count_same(mixed, texts, rows=rows, new_tokens=new_tokens)
        details: dict[str, Any] = {
            "bases": [base.identity.id for base in bases],
            "dtype": dtype,
            "rows": rows,
        }
        job.report(
            f"mixing.same_text.batch-{rows}",
            same / len(texts),
            "of the answers the same with and without a cache",
            at_least=1.0,
            prompts=len(texts),
            **details,
        )
        models: dict[str, Any] = {"mixture": mixed, "anchor": alone}
        models |= {f"source-{at}": base.model for at, base in enumerate(bases[1:], 1)}
        prompts_of = [tokens[0], *tokens]
        ways = {
            name: partial(generation_speed, model, prompt, new_tokens=new_tokens)
            for (name, model), prompt in zip(models.items(), prompts_of, strict=True)
        }
        for way in ways.values():
            way()  # warm up
        speeds = in_turn(ways, rounds=rounds)
        together = 1 / sum(1 / speed for name, speed in speeds.items() if name != "mixture")
        job.report(
            f"mixing.generation.batch-{rows}",
            speeds["mixture"] / together,
            "of the tokens/s of its bases one after the other",
            at_least=LEAST_SPEED if job.base else None,  # tiny bases cost less than a call
            tokens_per_second=speeds,
            new_tokens=new_tokens,
            **details,
        )


def _mix(bases: Sequence[Base]) -> MixedForCausalLM:
    """Return a mixture of loaded bases with an untrained gate; the first is the anchor."""
    words = [vocabulary_of(base) for base in bases]
    sources = []
    for base, own in zip(bases[1:], words[1:], strict=True):
        mapped = VocabularyMap(
            source=own.tokens,
            anchor=words[0].tokens,
            source_stops=own.stops,
            anchor_stops=words[0].stops,
        )
        recorded = {
            "name": Path(base.identity.id).name,
            "base": base.identity.id,
            "revision": base.identity.revision or "",
            "weights_sha256": base.identity.weights_sha256,
            "tokenizer_sha256": base.identity.tokenizer_sha256,
            "vocabulary_map_sha256": mapped.digest(),
        }
        forward = ForwardSettings()
        sources.append(SourceBase(recorded, base, anchor=words[0], forward=forward, where="bench"))
    gate = Gate(
        anchor_width=bases[0].identity.width,
        source_widths=(),
        num_sources=len(sources),
        shares=torch.full((len(bases),), 1 / len(bases)),
        seed=0,
    )
    return MixedForCausalLM(bases[0], Composition(bases[0], sources, gate))


def count_same(model: Any, texts: Sequence[str], *, rows: int, new_tokens: int) -> int:  # noqa: ANN401
    """Return for how many texts the same tokens are generated with and without a cache."""
    tokenizer, same = model.tokenizer, 0
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for first in range(0, len(texts), rows):
        batch = tokenizer(list(texts[first : first + rows]), return_tensors="pt", padding=True)
        given = batch.to(model.device)
        outs: list[Tensor] = [
            model.generate(
                given.input_ids,
                attention_mask=given.attention_mask,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=use_cache,
            )
            for use_cache in (True, False)
        ]
        same += int((outs[0] == outs[1]).all(dim=1).sum())
    return same


def _cut_texts(num: int) -> list[str]:
    """Return parts of Python source of different lengths, which end anywhere in a word."""
    draw = random.Random(0)
    characters = num * _LENGTHS[1]
    text = "".join(text for _, text in iter_documents(PYTHON, num_characters=characters))
    starts = [draw.randrange(len(text) - _LENGTHS[1]) for _ in range(num)]
    return [text[start : start + draw.randint(*_LENGTHS)] for start in starts]


def _make_bases(folder: Path) -> list[str]:
    """Save two tiny random bases whose tokenizers cut words in other ways; return their folders."""
    texts = [text[:20_000] for _, text in iter_documents(PYTHON, num_characters=40_000)]
    return [
        str(
            make_family_base(
                folder / f"base-{number}",
                "llama",
                tokenizer=_train_tokenizer(texts, split, vocab_size=size),
                vocab_size=size + 8,
                special_ids={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
                dtype=torch.float32,
                seed=number,
                max_position_embeddings=1024,
            )
        )
        for number, (split, size) in enumerate(zip(_SPLITS, (600, 1200), strict=True))
    ]


def _train_tokenizer(texts: Sequence[str], split: str, *, vocab_size: int) -> Any:  # noqa: ANN401
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
