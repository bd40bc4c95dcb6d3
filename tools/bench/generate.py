"""Tokens/s of customized models: against the base alone, and many carry-ons against one."""

import time
from typing import Any

import torch
from torch import Tensor

from carryon.tools.bench.compose_job import ComposeJob, make_carryons, make_prompts
from carryon.tools.compare.figure import Figure, in_turn
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.modeling import CarryOnForCausalLM

BASE_TARGET = 0.93
MIXED_TARGET = 0.6


def measure_generation(job: ComposeJob) -> None:
    """Generate with a carry-on and with the base alone, the base as transformers runs it."""
    for rows in job.sizes.batch_sizes:
        tokens = make_prompts(job.base, job.work, num=rows, num_tokens=job.sizes.prompt_tokens).to(
            job.base.device
        )
        model = _load(job, tokens, num=1)
        ways = {
            "carryon": lambda model=model, tokens=tokens: generation_speed(job, model, tokens),
            "base": lambda tokens=tokens: generation_speed(job, job.base.model, tokens),
        }
        compare_speeds(job, f"generate.batch-{rows}", ways, target=BASE_TARGET)


def measure_mixed_rows(job: ComposeJob) -> None:
    """Generate rows with a carry-on each, and as many rows that share one."""
    rows = job.sizes.mixed_rows
    tokens = make_prompts(job.base, job.work, num=rows, num_tokens=job.sizes.prompt_tokens)
    tokens = tokens.to(job.base.device)
    model = _load(job, tokens, num=rows)
    own = [_name(number) for number in range(rows)]
    ways = {
        "mixed": lambda: generation_speed(job, model, tokens, carryons=own),
        "one": lambda: generation_speed(job, model, tokens, carryons=[_name(0)] * rows),
    }
    compare_speeds(job, f"mixed.rows-{rows}", ways, target=MIXED_TARGET)


def _load(job: ComposeJob, tokens: Tensor, *, num: int) -> CarryOnForCausalLM:
    model = CarryOnForCausalLM.from_base(job.base)
    made = make_carryons(job.base, num, max_bytes=job.sizes.carryon_bytes, tokens=tokens[:1])
    for number, (carryon, card) in enumerate(made):
        saved = {name: w.detach().to(torch.bfloat16) for name, w in carryon.state_dict().items()}
        model.carryons.put(_name(number), saved, card)
    return model


def _name(number: int) -> str:
    return DEFAULT if number == 0 else f"carry-on-{number}"


def compare_speeds(job: ComposeJob, figure: str, ways: dict[str, Any], *, target: float) -> None:
    """Run two ways in turn and report the first's speed as a part of the second's."""
    for way in ways.values():
        way()  # memory and threads are set up
    speeds = in_turn(ways, rounds=job.sizes.rounds)
    first, second = speeds.values()
    job.report(
        Figure(
            figure=figure,
            value=first / second,
            unit="of the tokens/s",
            target=target,
            sense="at least",
            details={f"{name}_tokens_per_second": speed for name, speed in speeds.items()}
            | {"dtype": str(job.base.compute_dtype), "new_tokens": job.sizes.new_tokens},
        )
    )


def generation_speed(job: ComposeJob, model: Any, tokens: Tensor, **settings: Any) -> float:  # noqa: ANN401
    """Return tokens/s of generating from `tokens`, the prompt's own forward pass included."""
    started_at = time.perf_counter()
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=job.sizes.new_tokens,
        **settings,
    )
    num_new = (output.shape[1] - tokens.shape[1]) * len(tokens)
    int(output[0, -1])  # waits for the device
    return float(num_new / (time.perf_counter() - started_at))
