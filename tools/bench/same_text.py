"""Greedy text from a cache against recomputation of the whole text.

The recomputation shares only the trained module: base states by a forward pass without a cache, the
carry-on on all of them, the base's norm and head on the sum. One causal pass over the generated
text recomputes every choice in it. Prompts have one length, and both sides use the same batches, so
neither padding nor batching differs.

In bfloat16 a logit has 8 bits and the likeliest tokens often tie, for the base alone as well. The
target therefore holds in float32; the base's own type is reported beside the base alone.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base
from carryon.tools.bench.job import Job
from carryon.tools.bench.random_carryons import MAX_BYTES, make_carryons, make_prompts
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.carryon import CarryOn, customized_states

Logits = Callable[[Tensor, int], Tensor]
"""Of token ids [B, T] and n: the logits that decided each of the last n tokens, [B, n, V]."""


def measure_greedy(
    job: Job,
    *,
    prompts: int = 100,
    prompt_tokens: int = 64,
    new_tokens: int = 24,
    batch_sizes: tuple[int, ...] = (1, 8),
    carryon_bytes: int = MAX_BYTES,
) -> None:
    """Report the part of prompts with equal text, in float32 and in the base's type."""
    own_base = job.load_base()
    tokens = make_prompts(own_base, job.work, num=prompts, num_tokens=prompt_tokens)
    [(carryon, card)] = make_carryons(own_base, 1, max_bytes=carryon_bytes, tokens=tokens[:1])
    bases = [own_base]
    if own_base.compute_dtype != torch.float32:
        bases.insert(0, job.load_base(device=str(own_base.device), dtype="float32"))
    for base in bases:
        model: Any = CarryOnForCausalLM(base, carryon, card)
        plain = partial(plain_logits, base, _on(base, carryon))
        dtype = str(base.compute_dtype).removeprefix("torch.")
        for rows in batch_sizes:
            batches = torch.split(tokens.to(base.device), rows)
            details: dict[str, float] = {"prompts": prompts, "new_tokens": new_tokens}
            if base.compute_dtype != torch.float32:
                bare = partial(_last_logits, base)
                ratio, worst = _compare_texts(base.model, bare, batches, new_tokens)
                details |= {"base_alone": ratio, "base_alone_worst_choice": worst}
            ratio, worst = _compare_texts(model, plain, batches, new_tokens)
            job.report(
                f"greedy.{dtype}.batch-{rows}",
                ratio,
                "of the prompts identical",
                at_least=1.0 if base.compute_dtype == torch.float32 else None,
                **(details | {"worst_choice": worst}),
            )


def _last_logits(base: Base, tokens: Tensor, last: int) -> Tensor:
    return base_logits(base, tokens)[:, -last - 1 : -1]


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
    """Return the part of prompts with equal text, and the worst choice.

    The latter is the largest gap between the recomputed logit of a generated token and the highest
    logit, relative to that: 0 for equal texts, rounding where only ties differ.
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
        recomputed = logits(generated, num_new).float()
        chosen = generated[:, -num_new:]
        same += int((recomputed.argmax(dim=-1) == chosen).all(dim=1).sum())
        largest = recomputed.amax(dim=-1)
        short = (largest - recomputed.gather(2, chosen.unsqueeze(2)).squeeze(2)) / largest.abs()
        worst = max(worst, float(short.max()))
        total += len(tokens)
    return same / total, worst


def _on(base: Base, carryon: CarryOn) -> CarryOn:
    """Return the module on the base's device, its weights in the base's type."""
    placed = copy.deepcopy(carryon).to(base.device).eval().requires_grad_(False)
    for weight in placed.parameters():
        weight.data = weight.data.to(base.compute_dtype)
    return placed
