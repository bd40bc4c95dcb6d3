"""Training a carry-on from a store, LoRA on its base, and full fine-tuning of it, side by side.

The same samples, in the same batches: tokens a second of whole steps, in one process, in turn.
LoRA and full fine-tuning run the base forward and backward on rows padded to the longest sample;
its pads are not counted as tokens. All of them compute in the type that suits the device, as
`head_dtype` and `compute_dtype` have it with `auto`. Letters: N tokens of a batch.
"""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.model import Base, load_base
from carryon.cache.device import DEFAULT_CHUNK, pick_device
from carryon.cache.optional import require
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.train import TrainJob
from carryon.tools.compare.figure import Figure, in_turn
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    StreamSettings,
)
from carryon.train.data.batch import Batch
from carryon.train.data.datasets import open_data
from carryon.train.data.loader import Stream
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.step import take_step

LORA_TARGET = 20.0
RANK = 8
_IGNORED = -100  # label of a token that is no target, in transformers


def measure_lora(job: TrainJob) -> None:
    """Report how many times faster than LoRA's the carry-on's steps are, and the rest beside it."""
    sizes = job.sizes
    batches = take_batches(
        job.settings.store, sizes.lora_batch_tokens, count=sizes.lora_steps, taps=["final"]
    )
    num_tokens = sum(batch.num_tokens for batch in batches)
    store = Store.open(job.settings.store)
    module = build_carryon(CarryOnSettings(), store, seed=0).to(pick_device("auto"))
    carryon = carryon_steps(module, store, batches, learning_rate=1e-4)
    sampled = carryon_steps(
        module, store, batches, learning_rate=1e-4, sampled_softmax=sizes.sampled_rows
    )
    base_batches = [padded_rows(batch) for batch in batches]
    found: dict[str, dict[str, float]] = {}
    for name, lora in (("lora", True), ("full", False)):
        base = load_base(job.settings.base, forward=ForwardSettings())
        base_dtype = str(base.compute_dtype)
        ways = {
            "carryon": timed(carryon),
            "sampled": timed(sampled),
            name: timed(base_steps(base, base_batches, has_lora=lora)),
        }
        found[name] = in_turn(ways, rounds=sizes.rounds)
        del ways, base
        gc.collect()
    details = {
        "tokens_per_second": {
            way: num_tokens / (found["full"] if way == "full" else found["lora"])[way]
            for way in ("carryon", "sampled", "lora", "full")
        },
        "tokens": num_tokens,
        "steps": len(batches),
        "rank": RANK,
        "dtype": base_dtype,
    }
    _report_ratios(job, found, details)


def _report_ratios(
    job: TrainJob, seconds: dict[str, dict[str, float]], details: dict[str, Any]
) -> None:
    """Report LoRA and full fine-tuning against the carry-on that was timed in turn with them."""
    for figure, other, ours, target in (
        ("lora.speed", "lora", "carryon", LORA_TARGET),
        ("lora.speed_sampled", "lora", "sampled", None),
        ("full.speed", "full", "carryon", None),
    ):
        whose = "LoRA's" if other == "lora" else "full fine-tuning's"
        job.report(
            Figure(
                figure=figure,
                value=seconds[other][other] / seconds[other][ours],
                unit=f"of {whose} tokens/s",
                target=target,
                sense="at least",
                details=details
                | ({"sampled_softmax": job.sizes.sampled_rows} if ours == "sampled" else {}),
            )
        )


def take_batches(
    path: str, tokens_per_step: int, *, count: int, taps: Sequence[str]
) -> list[Batch]:
    """Return the first batches of an epoch, as training takes them."""
    data = open_data([path], StreamSettings(), taps=taps)
    [windows] = data.plan(OptimizationSettings(epochs=1, tokens_per_step=tokens_per_step))
    stream = Stream(data.store, windows, taps=taps, settings=data.settings, is_pinned=False)
    found: list[Batch] = []
    with stream as steps:
        for step in steps:
            found += step
            if len(found) >= count:
                break
    return found[:count]


def carryon_steps(
    carryon: CarryOn,
    store: Store,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    sampled_softmax: int = 0,
) -> Callable[[], None]:
    """Return what trains a carry-on of any kind by a step for each batch."""
    settings = OptimizationSettings()
    optimizer = build_optimizer(carryon, settings, MemorySettings())
    loss = LossSettings(sampled_softmax=sampled_softmax)
    head = place_training_head(store, loss, device=pick_device("auto"))

    def run() -> None:
        for batch in batches:
            take_step(
                carryon,
                optimizer,
                [batch],
                head=head,
                chunk=DEFAULT_CHUNK,
                learning_rate=learning_rate,
                grad_clip=settings.grad_clip,
            )

    return run


def padded_rows(batch: Batch) -> dict[str, NDArray[np.int64]]:
    """Return rows of tokens, attention mask and labels, as trainers of whole models take them."""
    shape = (len(batch.lengths), int(batch.lengths.max()))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, _IGNORED, np.int64)
    flat = np.full(batch.num_tokens, _IGNORED, np.int64)
    flat[batch.positions.numpy() + 1] = batch.targets.numpy()
    starts = np.cumsum(batch.lengths) - batch.lengths
    for row, (start, length) in enumerate(zip(starts, batch.lengths, strict=True)):
        ids[row, :length] = batch.tokens[start : start + length].numpy()
        mask[row, :length] = 1
        labels[row, :length] = flat[start : start + length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def base_steps(
    base: Base, batches: Sequence[dict[str, NDArray[np.int64]]], *, has_lora: bool
) -> Callable[[], None]:
    """Return what trains a base by a step for each batch: LoRA on it, or all of its weights."""
    model: Any = base.model
    if has_lora:
        peft = require("peft", extra="bench", purpose="comparing with LoRA")
        config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    else:
        model.requires_grad_(True)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    on_device = [
        {name: torch.from_numpy(values).to(base.device) for name, values in batch.items()}
        for batch in batches
    ]

    def run() -> None:
        for batch in on_device:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def timed(way: Callable[[], None]) -> Callable[[], float]:
    """Run `way` once, which sets up memory and threads; return what runs and times it."""
    way()

    def seconds() -> float:
        started_at = time.perf_counter()
        way()
        if torch.cuda.is_available():  # a waiting point: kernels run behind the calls
            torch.cuda.synchronize()
        return time.perf_counter() - started_at

    return seconds
