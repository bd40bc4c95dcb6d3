"""Greedy text from a cache against plain recomputation of the whole text.

The recomputation shares nothing with composing but the trained module: base states by a forward
pass without a cache, the carry-on on all of them, the base's norm and head on the sum. A causal
model says at every position what it would say of the text up to there alone, so one pass over the
generated text recomputes every choice in it: as long as all were the same, what came before each
is the recomputed text itself. Prompts of one length and the same batches on both sides, so that
neither pads nor another split of the work is what differs. In bfloat16 a logit has 8 bits, and the
likeliest tokens are often a rounding apart, for the base alone just as well; so the claim is made
in float32, and what the base's own type does is reported beside the base alone in that type.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.compose_job import ComposeJob, make_carryons, make_prompts
from carryon.tools.compare.figure import Figure
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.carryon import CarryOn, customized_states

Logits = Callable[[Tensor, int], Tensor]
"""Of token ids [B, T] and n: the logits that decided each of the last n tokens, [B, n, V]."""


def measure_greedy(job: ComposeJob) -> None:
    """Compare all prompts in batches of each size, in float32 and in the base's own type."""
    sizes = job.sizes
    prompts = make_prompts(job.base, job.work, num=sizes.prompts, num_tokens=sizes.prompt_tokens)
    made = make_carryons(job.base, 1, max_bytes=sizes.carryon_bytes, tokens=prompts[:1])
    carryon, card = made[0]
    is_wide = job.base.compute_dtype == torch.float32
    bases = [job.base] if is_wide else [_widened(job.base), job.base]
    for base in bases:
        model: Any = CarryOnForCausalLM(base, carryon, card)
        own = _on(base, carryon)
        dtype = str(base.compute_dtype).removeprefix("torch.")
        for rows in sizes.batch_sizes:
            batches = torch.split(prompts.to(base.device), rows)

            def plain(tokens: Tensor, last: int, base: Base = base, own: CarryOn = own) -> Tensor:
                return plain_logits(base, own, tokens, last)

            details: dict[str, float] = {"prompts": len(prompts), "new_tokens": sizes.greedy_tokens}
            if base.compute_dtype != torch.float32:
                alone: Any = base.model

                def bare(tokens: Tensor, last: int, base: Base = base) -> Tensor:
                    return base_logits(base, tokens)[:, -last - 1 : -1]

                share, worst = _compare_texts(alone, bare, batches, sizes.greedy_tokens)
                details |= {"base_alone": share, "base_alone_worst_choice": worst}
            share, worst = _compare_texts(model, plain, batches, sizes.greedy_tokens)
            job.report(
                Figure(
                    figure=f"greedy.{dtype}.batch-{rows}",
                    value=share,
                    unit="of the prompts identical",
                    target=1.0 if base.compute_dtype == torch.float32 else None,
                    sense="at least",
                    details=details | {"worst_choice": worst},
                )
            )


@torch.inference_mode()
def plain_logits(base: Base, carryon: CarryOn, tokens: Tensor, last: int) -> Tensor:
    """Return the customized logits before each of the `last` of `tokens` [B, T]: [B, last, V]."""
    states = capture(base, carryon.settings.taps, tokens)
    customized = customized_states(states["final"], carryon(states), alpha=1.0)
    before = customized[:, -last - 1 : -1].to(base.compute_dtype)
    logits: Tensor = base.architecture.head(before) * base.architecture.logit_scale
    cap = base.architecture.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _compare_texts(
    model: Any,  # noqa: ANN401 -- any model with `generate`
    logits: Logits,
    batches: tuple[Tensor, ...],
    num_new: int,
) -> tuple[float, float]:
    """Return the part of the prompts whose text is the same, and by how much a choice was worse.

    That is by how much the recomputed logit of a generated token lies below the largest one, as
    a part of that: 0 where all texts are the same, rounding where only ties are decided otherwise.
    """
    same = total = 0
    worst = 0.0
    for tokens in batches:
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=num_new,
        )
        found = logits(generated, num_new).float()
        chosen = generated[:, -num_new:]
        same += int((found.argmax(dim=-1) == chosen).all(dim=1).sum())
        largest = found.amax(dim=-1)
        short = (largest - found.gather(2, chosen.unsqueeze(2)).squeeze(2)) / largest.abs()
        worst = max(worst, float(short.max()))
        total += len(tokens)
    return same / total, worst


def _on(base: Base, carryon: CarryOn) -> CarryOn:
    """Return the module on the base's device, its weights in the base's type."""
    placed = copy.deepcopy(carryon).to(base.device).eval().requires_grad_(False)
    for weight in placed.parameters():
        weight.data = weight.data.to(base.compute_dtype)
    return placed


def _widened(base: Base) -> Base:
    device = str(base.device)
    return load_base(base.source, forward=ForwardSettings(device=device, compute_dtype="float32"))
