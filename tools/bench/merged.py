"""Merged and exported carry-ons run by transformers and PEFT: their logits and their speed.

Carry-ons are trained for a few steps, merged or exported, and loaded without this project. Logits
are compared in float32. The target is the change that rounding to bfloat16 makes, measured beside
it: of the logits, and of the weights where a checkpoint is written in bfloat16.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base
from carryon.cache.device import pick_device
from carryon.cache.optional import require
from carryon.tools.bench.generate import compare_speeds, generation_speed
from carryon.tools.bench.job import Job, in_turn, timed
from carryon.tools.bench.lora import RANK, base_steps, carryon_steps, padded_rows, take_batches
from carryon.tools.bench.merge_carryons import TOKENS_PER_STEP, MergeInput, open_input
from carryon.train.config import rates_of
from carryon.train.inference.merge import load_for_base, merge
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.base_blocks import BlocksCarryOn
from carryon.train.modules.carryon import build_carryon
from carryon.train.modules.packed_attention import pack

GENERATE_TARGET = 1.0
SPEED_TARGET = 3.0
_LOGIT_TOKENS = 128
_PROMPT_TOKENS = 32


def measure_native(job: Job, *, tokens_per_step: int = TOKENS_PER_STEP) -> None:
    """Compare the merged checkpoint of a `native` with the customized model."""
    _measure_logits(job, open_input(job, tokens_per_step=tokens_per_step), "native")


def measure_top(job: Job, *, tokens_per_step: int = TOKENS_PER_STEP) -> None:
    """Compare the merged checkpoint of a `top` with the customized model."""
    _measure_logits(job, open_input(job, tokens_per_step=tokens_per_step), "top")


def measure_adapter(job: Job, *, tokens_per_step: int = TOKENS_PER_STEP) -> None:
    """Compare the PEFT adapter of a `top` by LoRA, and its merged checkpoint, in the same way."""
    require("peft", extra="bench", purpose="loading an adapter")
    given = open_input(job, tokens_per_step=tokens_per_step)
    _measure_logits(job, given, "top-lora", names=("adapter", "top-lora"))


def measure_generation(
    job: Job,
    *,
    tokens_per_step: int = TOKENS_PER_STEP,
    new_tokens: int = 32,
    rounds: int = 5,
) -> None:
    """Report generation speed of the merged checkpoint of a `top` against its base."""
    given = open_input(job, tokens_per_step=tokens_per_step)
    out = job.work / "merged"
    merge(given.train("top", job.work / "top"), base=job.base, out=out)
    base = job.load_base()
    merged: Any = AutoModelForCausalLM.from_pretrained(
        out, dtype=base.compute_dtype, attn_implementation=base.attention
    )
    tokens = given.tokens(_PROMPT_TOKENS).to(base.device)
    speed = partial(generation_speed, tokens=tokens, new_tokens=new_tokens)
    ways = {"merged": partial(speed, merged.to(base.device)), "base": partial(speed, base.model)}
    details = {"dtype": str(base.compute_dtype), "new_tokens": new_tokens}
    job.add(compare_speeds("generate.speed", ways, details, target=GENERATE_TARGET, rounds=rounds))


def measure_speed(
    job: Job,
    *,
    tokens_per_step: int = TOKENS_PER_STEP,
    steps: int = 2,
    rounds: int = 5,
) -> None:
    """Report the step speed of a `top`, trained whole and by LoRA, against LoRA on the base."""
    given = open_input(job, tokens_per_step=tokens_per_step)
    store, shape = given.store, given.shape("top")
    batches = take_batches(store, tokens_per_step, count=steps, taps=shape.taps)
    device = pick_device("auto")
    ways = {}
    for name in ("top", "top-lora"):
        carryon = build_carryon(given.shape(name), store, seed=0).to(device)
        rate = rates_of(carryon.settings)[0]
        ways[name] = timed(carryon_steps(carryon, store, batches, learning_rate=rate))
    base = job.load_base()
    ways["lora"] = timed(base_steps(base, [padded_rows(batch) for batch in batches], has_lora=True))
    seconds = in_turn(ways, rounds=rounds)
    num_tokens = sum(batch.num_tokens for batch in batches)
    for name, target in (("top", SPEED_TARGET), ("top-lora", None)):
        job.report(
            f"{name}.speed",
            seconds["lora"] / seconds[name],
            "of LoRA's tokens/s",
            at_least=target,
            tokens_per_second={way: num_tokens / each for way, each in seconds.items()},
            tokens=num_tokens,
            targets=sum(batch.num_targets for batch in batches),
            blocks=shape.blocks,
            blocks_of_base=base.identity.num_layers,
            rank=RANK,
            dtype=str(base.compute_dtype),
        )


def _measure_logits(job: Job, given: MergeInput, shape: str, *, names: Sequence[str] = ()) -> None:
    carryon = given.train(shape, job.work / shape)
    for name in names or (shape,):
        _report_logits(job, given, name, carryon)


@torch.no_grad()
def _report_logits(job: Job, given: MergeInput, name: str, carryon: Path) -> None:
    """Report the largest logit difference to the customized model, as served and as trained."""
    is_adapter = name == "adapter"
    out = job.work / f"{name}-written"
    merge(carryon, base=job.base, out=out, adapter=is_adapter, device="cpu")
    base = job.load_base(device="cpu", dtype="float32")  # so that only weights can differ
    tokens = given.tokens(_LOGIT_TOKENS)
    alone = base_logits(base, tokens)
    trained = trained_logits(base, load_for_base(carryon, base), tokens)
    composed = CarryOnForCausalLM.from_pretrained(carryon, base=base)
    served = composed(tokens).logits
    rounding = {"logits": _distance(served, served.to(torch.bfloat16).float()), "weights": 0.0}
    if is_adapter:
        peft: Any = require("peft", extra="bench", purpose="loading an adapter")
        written = peft.PeftModel.from_pretrained(base.model, str(out))(tokens).logits
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        written = model(tokens).logits
        for weight in composed.parameters():
            weight.copy_(weight.to(base.checkpoint_dtype))  # as in the checkpoint
        rounding["weights"] = _distance(served, composed(tokens).logits)
    against = {"served": _distance(written, served), "trained": _distance(written, trained)}
    job.report(
        f"{name}.logits",
        max(against.values()),
        "largest difference",
        at_most=sum(rounding.values()),
        against=against,
        rounding_to_bfloat16=rounding,
        moved_by_the_carryon=_distance(alone, served),
        largest_logit=float(served.abs().max()),
        tokens=tokens.shape[1],
        blocks=given.shape("native" if name == "native" else "top").blocks,
        blocks_of_base=base.identity.num_layers,
    )


def trained_logits(base: Base, module: BlocksCarryOn, tokens: Tensor) -> Tensor:
    """Return logits [1, T, V] as training computes them: base states, carry-on, head."""
    states = {tap: each[0] for tap, each in capture(base, module.settings.taps, tokens).items()}
    num_tokens = tokens.shape[1]
    final = module.correct_packed(
        states, pack(torch.tensor([num_tokens])), torch.arange(num_tokens)
    )
    logits: Tensor = base.architecture.head(final)[None] * base.architecture.logit_scale
    cap = base.architecture.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max())
