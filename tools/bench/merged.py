"""What a carry-on is once it is merged or exported: its logits, and its speed, by others' code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.optional import require
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.compose_job import ComposeJob
from carryon.tools.bench.compose_settings import BenchComposeSizes
from carryon.tools.bench.generate import compare_speeds, generation_speed
from carryon.tools.bench.merge_job import MergeJob
from carryon.tools.compare.figure import Figure
from carryon.train.inference.merge import load_for_base, merge
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.base_blocks import BlocksCarryOn
from carryon.train.modules.packed_attention import pack

GENERATE_TARGET = 1.0
_EXACT = ForwardSettings(device="cpu", compute_dtype="float32")
"""Both sides of a comparison of logits are computed like this, so that only weights can differ."""


def measure_native(job: MergeJob) -> None:
    """Compare the merged checkpoint of a `native` with the customized model."""
    _report_logits(job, "native", job.train("native"), is_adapter=False)


def measure_top(job: MergeJob) -> None:
    """Compare the merged checkpoint of a `top` with the customized model."""
    _report_logits(job, "top", job.train("top"), is_adapter=False)


def measure_adapter(job: MergeJob) -> None:
    """Compare the PEFT adapter of a `top` trained by LoRA, and its checkpoint, in the same way."""
    require("peft", extra="bench", purpose="loading an adapter")
    carryon = job.train("top-lora")
    _report_logits(job, "adapter", carryon, is_adapter=True)
    _report_logits(job, "top-lora", carryon, is_adapter=False)


def measure_generation(job: MergeJob) -> None:
    """Generate with the merged checkpoint of a `top` and with its base, in turn."""
    out = job.work / "merged"
    merge(job.train("top"), base=job.base, out=out)
    base = load_base(job.base, forward=ForwardSettings())
    merged: Any = AutoModelForCausalLM.from_pretrained(
        out, dtype=base.compute_dtype, attn_implementation=base.attention
    )
    merged = merged.to(base.device)
    sizes = BenchComposeSizes(new_tokens=job.sizes.new_tokens, rounds=job.sizes.rounds)
    compose = ComposeJob(base=base, sizes=sizes, work=job.work, report=job.report)
    tokens = job.tokens(job.sizes.prompt_tokens).to(base.device)
    ways = {
        "merged": lambda: generation_speed(compose, merged, tokens),
        "base": lambda: generation_speed(compose, base.model, tokens),
    }
    compare_speeds(compose, "generate.speed", ways, target=GENERATE_TARGET)


@torch.no_grad()
def _report_logits(job: MergeJob, name: str, carryon: Path, *, is_adapter: bool) -> None:
    """Report the largest difference to the customized model: as served, and as it was trained."""
    out = job.work / f"{name}-written"
    merge(carryon, base=job.base, out=out, adapter=is_adapter, device="cpu")
    base = load_base(job.base, forward=_EXACT)
    tokens = job.tokens(job.sizes.logit_tokens)
    alone = base_logits(base, tokens)
    trained = trained_logits(base, load_for_base(carryon, base), tokens)
    composed = CarryOnForCausalLM.from_pretrained(carryon, base=base)
    served = composed(tokens).logits
    rounding = {"logits": _largest(served, served.to(torch.bfloat16).float()), "weights": 0.0}
    if is_adapter:
        peft: Any = require("peft", extra="bench", purpose="loading an adapter")
        found = peft.PeftModel.from_pretrained(base.model, str(out))(tokens).logits
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        found = model(tokens).logits
        for weight in composed.parameters():
            weight.copy_(weight.to(base.checkpoint_dtype))  # what a checkpoint's weights have
        rounding["weights"] = _largest(served, composed(tokens).logits)
    against = {"served": _largest(found, served), "trained": _largest(found, trained)}
    job.report(
        Figure(
            figure=f"{name}.logits",
            value=max(against.values()),
            unit="largest difference",
            target=sum(rounding.values()),
            details={
                "against": against,
                "rounding_to_bfloat16": rounding,
                "moved_by_the_carryon": _largest(alone, served),
                "largest_logit": float(served.abs().max()),
                "tokens": tokens.shape[1],
                "blocks": job.shape("native" if name == "native" else "top").blocks,
                "blocks_of_base": base.identity.num_layers,
            },
        )
    )


def trained_logits(base: Base, module: BlocksCarryOn, tokens: Tensor) -> Tensor:
    """Return [1, T, V] by the way of training: the base's states, the carry-on, the head."""
    states = {tap: each[0] for tap, each in capture(base, module.settings.taps, tokens).items()}
    num_tokens = tokens.shape[1]
    final = module.correct_packed(
        states, pack(torch.tensor([num_tokens])), torch.arange(num_tokens)
    )
    logits: Tensor = base.architecture.head(final)[None] * base.architecture.logit_scale
    cap = base.architecture.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())
