"""Generation speed of customized models: against the base, and of many carry-ons against one."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from carryon.cache.base.model import Base
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.random_carryons import MAX_BYTES, make_carryons, make_prompts
from carryon.tools.compare.figure import Figure
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.single_queries import packed_heads

BASE_TARGET = 0.93
MIXED_TARGET = 0.6
EQUAL_ROWS_TARGET = 1.0


def measure_generation(
    job: Job,
    *,
    batch_sizes: tuple[int, ...] = (1, 8),
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    carryon_bytes: int = MAX_BYTES,
    rounds: int = 7,
) -> None:
    """Report tokens/s with a carry-on against the base as transformers runs it."""
    base = job.load_base()
    for rows in batch_sizes:
        tokens = make_prompts(base, job.work, num=rows, num_tokens=prompt_tokens).to(base.device)
        model = _load(base, tokens, num=1, max_bytes=carryon_bytes)
        speed = partial(generation_speed, tokens=tokens, new_tokens=new_tokens)
        ways = {"carryon": partial(speed, model), "base": partial(speed, base.model)}
        details = {"dtype": str(base.compute_dtype), "new_tokens": new_tokens}
        name = f"generate.batch-{rows}"
        job.add(compare_speeds(name, ways, details, target=BASE_TARGET, rounds=rounds))


def measure_mixed_rows(
    job: Job,
    *,
    rows: int = 16,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    carryon_bytes: int = MAX_BYTES,
    rounds: int = 7,
) -> None:
    """Report tokens/s of rows with a carry-on each against as many rows that share one."""
    base = job.load_base()
    tokens = make_prompts(base, job.work, num=rows, num_tokens=prompt_tokens).to(base.device)
    model = _load(base, tokens, num=rows, max_bytes=carryon_bytes)
    names = [_name(number) for number in range(rows)]
    speed = partial(generation_speed, model, tokens=tokens, new_tokens=new_tokens)
    ways = {
        "mixed": partial(speed, carryons=names),
        "one": partial(speed, carryons=[_name(0)] * rows),
    }
    details = {"dtype": str(base.compute_dtype), "new_tokens": new_tokens}
    name = f"mixed.rows-{rows}"
    job.add(compare_speeds(name, ways, details, target=MIXED_TARGET, rounds=rounds))


@torch.no_grad()
def measure_equal_rows(
    job: Job, *, rows: int = 64, prompt_tokens: int = 500, new_tokens: int = 4, rounds: int = 5
) -> None:
    """Report tokens/s of decoding rows of equal length by `packed_heads` against transformers."""
    base = job.load_base()
    prompt = make_prompts(base, job.work, num=1, num_tokens=prompt_tokens).to(base.device)
    first: Any = base.model(prompt, use_cache=True, logits_to_keep=1)
    token = first.logits[:, -1:].argmax(-1).expand(rows, 1)

    def speed(block: AbstractContextManager[None]) -> float:
        cache = copy.deepcopy(first.past_key_values)
        cache.batch_repeat_interleave(rows)
        with block:
            started_at = time.perf_counter()
            for _ in range(new_tokens):
                base.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return rows * new_tokens / (time.perf_counter() - started_at)

    ways = {"packed": lambda: speed(packed_heads()), "transformers": lambda: speed(nullcontext())}
    details = {"dtype": str(base.compute_dtype), "rows": rows, "prompt_tokens": prompt_tokens}
    job.add(compare_speeds("equal_rows", ways, details, target=EQUAL_ROWS_TARGET, rounds=rounds))


def _load(base: Base, tokens: Tensor, *, num: int, max_bytes: int) -> CarryOnForCausalLM:
    model = CarryOnForCausalLM.from_base(base)
    made = make_carryons(base, num, max_bytes=max_bytes, tokens=tokens[:1])
    for number, (carryon, card) in enumerate(made):
        saved = {name: w.detach().to(torch.bfloat16) for name, w in carryon.state_dict().items()}
        model.carryons.put(_name(number), saved, card)
    return model


def _name(number: int) -> str:
    return DEFAULT if number == 0 else f"carry-on-{number}"


def compare_speeds(
    figure: str,
    ways: Mapping[str, Callable[[], float]],
    details: Mapping[str, Any],
    *,
    target: float,
    rounds: int,
) -> Figure:
    """Run two ways in turn and return the first's speed relative to the second's."""
    for way in ways.values():
        way()  # warm up
    speeds = in_turn(ways, rounds=rounds)
    first, second = speeds.values()
    return Figure(
        figure=figure,
        value=first / second,
        unit="of the tokens/s",
        target=target,
        sense="at least",
        details={f"{name}_tokens_per_second": speed for name, speed in speeds.items()}
        | dict(details),
    )


def generation_speed(model: Any, tokens: Tensor, *, new_tokens: int, **settings: Any) -> float:  # noqa: ANN401
    """Return tokens/s of generating after `tokens`, including the prompt's forward pass."""
    started_at = time.perf_counter()
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=new_tokens,
        **settings,
    )
    num_new = (output.shape[1] - tokens.shape[1]) * len(tokens)
    int(output[0, -1])  # waits for the device
    return float(num_new / (time.perf_counter() - started_at))
