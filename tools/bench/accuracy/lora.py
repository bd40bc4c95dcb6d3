"""`cot-lora`: LoRA on the whole base, for as long as a carry-on took with its extraction.

It trains on the samples of the carry-on's store, token by token the same, through the loss of
`carryon compare`, where LoRA is at its fastest. The result is an adapter for PEFT.
"""

import logging
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from carryon.cache.base.model import Base, load_base
from carryon.cache.corpus.samples import Sample
from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.cache.progress import Progress
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.accuracy.plan import LORA_RATES
from carryon.tools.cli.output import print_result
from carryon.tools.compare.data import iter_steps
from carryon.tools.compare.methods import Learner, build_learner, read_samples
from carryon.tools.compare.row import descend
from carryon.tools.compare.settings import LORA_RANK, Method
from carryon.train.config import (
    CarryOnSettings,
    MemorySettings,
    OptimizationSettings,
    StreamSettings,
)
from carryon.train.data.datasets import split_store
from carryon.train.optim.lr_schedule import learning_rate as rate_at
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.trainer.finish import read_finished

logger = logging.getLogger(__name__)

_PARTS = 1000  # of the budget, as steps of the schedule
_FEW_STEPS = 20
"""In fewer the warm-up is less than a step."""
_EVALUATED_TOGETHER = 4
ADAPTER = "adapter_model.safetensors"


def train_lora(
    *,
    base: str,
    store: str,
    out: str,
    run: str = "",
    seconds: float = 0.0,
    seed: int = 0,
    learning_rates: list[float] = list(LORA_RATES),  # noqa: B006 -- shown in the help, never changed
    tokens_per_step: int = 384,
    sampled_softmax: int = 2048,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Train LoRA (rank 8, all matrices of all blocks) against the clock; a step of experiment-cot.

    The clock counts training steps: as many seconds as the extraction of the store and the training
    of --run took. It stops while the base is loaded and while held-out samples are evaluated. Each
    learning rate has the whole clock, and the one with the lowest held-out loss is kept: LoRA is
    not charged for the choice. OUT is then an adapter for PEFT. An interrupted training starts
    again.

    Example:
        python -m carryon.tools.bench cot-lora --base BASE --store store --run run --out lora

    Args:
        base: The base: hub id, folder or .gguf file.
        store: Folder of the carry-on's store, for the samples and the seconds of extraction.
        out: Folder of the adapter.
        run: Folder of the carry-on's run, for the seconds of training.
        seconds: The clock, instead of that of --run. 0: that of --run.
        seed: Seed of the weights and of the order of samples.
        learning_rates: Highest learning rates to choose from.
        tokens_per_step: Tokens of a step.
        sampled_softmax: As of carryon train.
        forward: How the base is run.
    """
    opened = Store.open(store)
    if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
        given = " ".join(f"{rate:g}" for rate in learning_rates)
        raise InputError(f"--learning-rates: expected one or more above 0, got {given!r}")
    if not seconds and not run:
        raise InputError("--run: expected a run or --seconds, got neither. Fix: --run FOLDER")
    budget_s = seconds or extraction_seconds(opened) + read_finished(run).train_s
    split = split_store(opened, StreamSettings())
    train, held_out = (_read(opened, half.tolist()) for half in (split.train, split.held_out))
    best: dict[str, Any] = {"lora_nll": math.inf}
    nlls, num_bytes = dict[str, float](), 0
    for rate in learning_rates:
        settings = OptimizationSettings(learning_rate=rate, warmup_ratio=0.05, seed=seed)
        loaded = load_base(base, forward=forward)  # again: training has changed the last one
        learner = build_learner(
            Method(name="lora", rates=(rate,)),
            load_base=partial(_given, loaded),
            store=None,
            seed=seed,
            samples=train,
            sampled_softmax=sampled_softmax,
        )
        base_nll = _evaluate(learner, held_out)
        facts = _train(learner, train, settings, budget_s=budget_s, tokens_per_step=tokens_per_step)
        facts |= {"base_nll": base_nll, "lora_nll": _evaluate(learner, held_out)}
        nlls[f"{rate:g}"] = facts["lora_nll"]
        if facts["lora_nll"] < best["lora_nll"]:
            best = {"learning_rate": rate, **facts}
            num_bytes = _save(Path(out), loaded)
    if not num_bytes:
        raise InputError(
            f"--learning-rates: expected one with a finite held-out loss, got {nlls}. Fix: smaller "
            "ones"
        )
    return print_result(
        {"out": out, "clock_s": budget_s, "bytes": num_bytes, **best, "nll_by_rate": nlls},
        f"{out}: {best['tokens']:,} tokens in {best['train_s']:,.0f} s; held-out NLL of the base "
        f"{best['base_nll']:.4f}, with LoRA {best['lora_nll']:.4f} (learning rate "
        f"{best['learning_rate']:g}, the best of {len(nlls)})",
    )


def _given(base: Base) -> Base:
    return base


def extraction_seconds(store: Store) -> float:
    """Return the seconds of a store's forward passes and writing, whoever ran them."""
    return sum(store.receipt(unit).elapsed_s for unit in range(store.num_units))


def _read(store: Store, chosen: Sequence[int]) -> list[Sample]:
    """Return the samples of a store, without states."""
    read = [store.read_sample(index, taps=[]) for index in chosen]
    return [
        Sample(
            id=each.id,
            tokens=each.tokens,
            loss_mask=each.loss_mask,
            char_end=each.char_end,
            is_held_out=False,
        )
        for each in read
    ]


def _train(
    learner: Learner,
    samples: Sequence[Sample],
    settings: OptimizationSettings,
    *,
    budget_s: float,
    tokens_per_step: int,
) -> dict[str, Any]:
    """Train until the budget ends, at least one step; return the totals."""
    optimizer = build_optimizer(learner.model, settings, MemorySettings())  # type: ignore[arg-type]
    read = read_samples(samples)
    steps = iter_steps(samples, len(samples), seed=settings.seed, tokens_per_step=tokens_per_step)
    clock_s, tokens, epoch, took = 0.0, 0, 0, list[float]()
    torch.manual_seed(settings.seed)
    with Progress(max(1, round(budget_s)), name="lora", unit="s") as progress:
        while not took or clock_s + 0.5 * statistics.median(took) < budget_s:
            started_at = time.perf_counter()
            epoch, chosen = next(steps)
            part = min(_PARTS - 1, int(_PARTS * clock_s / budget_s))
            rate = rate_at(part, num_steps=_PARTS, settings=settings)
            loss = descend(learner, optimizer, read(chosen), rate=rate)
            took.append(time.perf_counter() - started_at)
            clock_s += took[-1]
            tokens += sum(len(samples[index].tokens) for index in chosen.tolist())
            progress.note = f"loss {loss:.3f}"
            progress.update(int(clock_s) - int(clock_s - took[-1]))
    if len(took) < _FEW_STEPS:
        logger.warning(
            f"LoRA: expected {_FEW_STEPS} steps or more, got {len(took)} in {budget_s:,.0f} s: it "
            "has learned little, so its figures say little. Fix: more --samples or --epochs"
        )
    return {"train_s": clock_s, "tokens": tokens, "steps": len(took), "epochs": epoch + 1}


@torch.no_grad()
def _evaluate(learner: Learner, samples: Sequence[Sample]) -> float:
    """Return the mean NLL of the targets."""
    read, total, targets = read_samples(samples), 0.0, 0
    for first in range(0, len(samples), _EVALUATED_TOGETHER):
        batch = read(np.arange(first, min(first + _EVALUATED_TOGETHER, len(samples))))
        total += float(learner.losses(batch).double().sum())
        targets += batch.num_targets
    return total / targets


def _save(folder: Path, base: Base) -> int:
    """Write the LoRA in `base` as an adapter for PEFT; return the bytes of its weights."""
    peft: Any = require("peft", extra="lora", purpose="LoRA")
    weights = {
        f"base_model.model.{name.replace('.default', '')}": weight.detach()
        .to("cpu", torch.bfloat16)
        .contiguous()
        for name, weight in base.model.named_parameters()
        if ".lora_" in name
    }
    settings = CarryOnSettings(kind="top", lora_rank=LORA_RANK)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights}),
        base_model_name_or_path=str(base.identity.id),
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
    return sum(weight.nbytes for weight in weights.values())
