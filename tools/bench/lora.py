"""Training a carry-on from a store, LoRA on its base, and full fine-tuning of it, side by side.

The same samples in the same batches: tokens/s of whole steps. LoRA and full fine-tuning run the
base forward and backward on rows padded to the longest sample; padding is not counted as tokens.
All compute in the type that suits the device.
"""

import gc
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.model import Base
from carryon.cache.device import DEFAULT_CHUNK, pick_device
from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.cache.store.reader import Store
from carryon.tools.bench.epoch import iter_batches
from carryon.tools.bench.job import Job, in_turn, timed
from carryon.tools.bench.loss import in_fastest_way
from carryon.train.config import CarryOnSettings, LossSettings, MemorySettings, OptimizationSettings
from carryon.train.data.batch import Batch
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.step import take_step

TARGETS = {"lora.speed": (18.0, 15.0), "lora.speed_sampled": (45.0, 60.0)}
"""With a small and with a large vocabulary, of which the exact loss is most of the work."""
_LARGE = 100_000
RANK = 8
_IGNORED = -100  # label of a token that is not a target, in transformers


def measure_lora(
    job: Job,
    *,
    steps: int = 4,
    tokens_per_step: int = 1024,
    sampled: int = 2048,
    rounds: int = 5,
    ways: tuple[str, ...] = ("lora", "full"),
) -> None:
    """Report the step speed of a carry-on, exact and sampled, against LoRA and full fine-tuning."""
    if unknown := set(ways) - {"lora", "full"}:
        raise InputError(f"--sizes ways: expected lora, full, got {min(unknown)}")
    store = job.open_store()
    batches = take_batches(store, tokens_per_step, count=steps, taps=["final"])
    num_tokens = sum(batch.num_tokens for batch in batches)
    module = build_carryon(CarryOnSettings(), store, seed=0).to(pick_device("auto"))
    carryon = carryon_steps(module, store, batches, learning_rate=1e-4)
    with_sampling = carryon_steps(
        module, store, batches, learning_rate=1e-4, sampled_softmax=sampled
    )
    base_batches = [padded_rows(batch) for batch in batches]
    seconds: dict[str, dict[str, float]] = {}
    for name in ways:
        base = job.load_base()
        dtype = str(base.compute_dtype)
        turns = {
            "carryon": timed(carryon),
            "sampled": timed(with_sampling),
            name: timed(base_steps(base, base_batches, has_lora=name == "lora")),
        }
        seconds[name] = in_turn(turns, rounds=rounds)
        del turns, base
        gc.collect()
    details: dict[str, Any] = {
        "tokens_per_second": {
            way: num_tokens / seconds[way if way in ways else ways[0]][way]
            for way in ("carryon", "sampled", *ways)
        },
        "tokens": num_tokens,
        "targets": sum(len(batch.targets) for batch in batches),
        "vocabulary": len(store.head().weight),
        "steps": len(batches),
        "rank": RANK,
        "dtype": dtype,
    }
    is_large = len(store.head().weight) >= _LARGE
    for figure, other, ours in (
        ("lora.speed", "lora", "carryon"),
        ("lora.speed_sampled", "lora", "sampled"),
        ("full.speed", "full", "carryon"),
    ):
        if other not in ways:
            continue
        whose = "LoRA's" if other == "lora" else "full fine-tuning's"
        job.report(
            figure,
            seconds[other][other] / seconds[other][ours],
            f"of {whose} tokens/s",
            at_least=TARGETS[figure][is_large] if figure in TARGETS else None,
            **(details | ({"sampled_softmax": sampled} if ours == "sampled" else {})),
        )


def take_batches(
    store: Store, tokens_per_step: int, *, count: int, taps: Sequence[str]
) -> list[Batch]:
    """Return the first batches of an epoch as training reads them."""
    return list(islice(iter_batches(store, taps=taps, tokens_per_step=tokens_per_step), count))


def carryon_steps(
    carryon: CarryOn,
    store: Store,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    sampled_softmax: int = 0,
) -> Callable[[], None]:
    """Return a function that trains a carry-on of any kind by one step per batch."""
    settings = OptimizationSettings()
    optimizer = build_optimizer(carryon, settings, MemorySettings())
    loss = LossSettings(sampled_softmax=sampled_softmax)
    head = place_training_head(store, loss, device=pick_device("auto"))
    head = in_fastest_way(head, positions=max(len(batch.targets) for batch in batches))

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
    """Return padded rows of tokens, attention mask and labels, the input of transformers."""
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
    """Return a function that trains a base by one step per batch, by LoRA or all its weights."""
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
