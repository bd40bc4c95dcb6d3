"""Peak memory to train a large carry-on on a large base, and its estimate.

The trainer runs in a fresh process. The figure is anonymous memory above that of an interpreter
that has imported torch. The store is synthetic, with a head of real size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryon.cache.device import pick_head_dtype
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job, run_fresh
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import StateSet
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    StreamSettings,
    TrainSettings,
)
from carryon.train.trainer.forecast.memory_estimate import MemoryCase, plan_memory

TARGET_GB = 0.75
PLAN_TARGET = 0.10
"""Largest error of `carryon plan-memory`, either way, relative to the measured peak."""
_SAMPLES_A_STEP = 8
_HELD_OUT = 1
_FIRST_VOCABULARY = 256  # rows that the probe covers
_ROWS_AT_ONCE = 8192  # of the head, in float32
_LOSS = LossSettings(head_place="mapped")
_MEMORY = MemorySettings(
    weights_dtype="bfloat16", optimizer_bits=8, step_in_backward=True, recompute=True
)

_TRAIN = """
import json, sys
import torch
from carryon.tools.compare.peak_memory import anonymous_bytes
before = anonymous_bytes()
from carryon.tools.bench.memory import train_watched
print(json.dumps(train_watched(json.loads(sys.argv[1]), before=before)))
"""


def measure_memory(
    job: Job,
    *,
    width: int = 5120,
    vocabulary: int = 152_064,
    carryon_width: int = 1760,
    tokens: int = 2048,
    steps: int = 2,
) -> None:
    """Report the peak, the error of the loss against the plain formula, and that of the estimate.

    A carry-on of width 1,760 has 100 million weights on a base of width 5,120.
    """
    root = job.work / "store"
    write_large_store(root, width=width, vocab_size=vocabulary, step_tokens=tokens, num_steps=steps)
    shape = carryon_shape(carryon_width)
    request = {
        "store": str(root),
        "out": str(job.work / "run"),
        "carryon": shape.to_dict(),
        "tokens_per_step": tokens,
    }
    run = run_fresh(_TRAIN, json.dumps(request))
    plain = plain_base_nll(Store.open(root))
    job.report(
        "memory.peak",
        run["peak_bytes"] / 1e9,
        "GB",
        at_most=TARGET_GB,
        hard_limit_gb=1.0,
        **run,
        base_nll_plain=plain,
        base_nll_error=abs(run["base_nll"] - plain),
    )
    case = MemoryCase(
        base_width=width,
        vocab_size=vocabulary,
        micro_batch_tokens=tokens,
        supervised_ratio=1 - _SAMPLES_A_STEP / tokens,  # all but the first token of a sample
        window_tokens=tokens,
        head_bytes=pick_head_dtype(_LOSS.head_dtype, torch.device("cpu")).itemsize,
        carryon=shape,
        loss=_LOSS,
        memory=_MEMORY,
    )
    parts = plan_memory(case)
    ratio = sum(parts.values()) / run["peak_bytes"]
    job.report(
        "memory.plan",
        abs(ratio - 1),
        "error relative to the measured peak",
        at_most=PLAN_TARGET,
        ratio=ratio,
        planned_bytes=sum(parts.values()),
        measured_bytes=run["peak_bytes"],
        parts=parts,
    )


def carryon_shape(width: int) -> CarryOnSettings:
    """Return a carry-on whose MLP is 2.6 times as wide as its blocks."""
    heads = next(heads for heads in (16, 8, 4, 2, 1) if width % (2 * heads) == 0)
    return CarryOnSettings(width=width, heads=heads, intermediate_size=int(2.6 * width))


def train_watched(request: Mapping[str, Any], *, before: int) -> dict[str, Any]:
    """Train with all memory settings; return the peak above `before`, in bytes."""
    from carryon.tools.compare.peak_memory import anonymous_bytes, watched_peak
    from carryon.train.trainer.trainer import train

    imported = anonymous_bytes()
    with watched_peak() as peak:
        report = train(
            request["store"],
            out=request["out"],
            settings=TrainSettings(loss=_LOSS, memory=_MEMORY),
            **request["carryon"],
            epochs=1,
            tokens_per_step=request["tokens_per_step"],
            warmup_ratio=0.0,
            window_units=1,
            device="cpu",
        )
    return {
        "peak_bytes": peak.bytes - before,
        "imports_bytes": imported - before,
        "num_parameters": report.num_parameters,
        "steps": report.num_steps,
        "train_s": report.train_s,
        "base_nll": report.base_nll,
        "carryon_nll": report.carryon_nll,
    }


def write_large_store(
    root: Path, *, width: int, vocab_size: int, step_tokens: int, num_steps: int
) -> None:
    """Write a store of random states with the tokens of `num_steps` steps."""
    random = np.random.default_rng(0)
    sample_tokens = step_tokens // _SAMPLES_A_STEP
    num_samples = num_steps * _SAMPLES_A_STEP + _HELD_OUT
    num_rows = num_samples * sample_tokens
    normal = random.standard_normal((num_rows, width), dtype=np.float32)
    states = StateSet(
        name="large",
        taps=["final"],
        lengths=np.full(num_samples, sample_tokens, dtype=np.int32),
        tokens=random.integers(0, vocab_size, num_rows).astype(np.int32),
        hidden={"final": bfloat16_bits(normal * np.float32(3 / width**0.5))},
    )
    write_scratch_store(
        root,
        states,
        settings=StoreSettings(unit_tokens=step_tokens),
        vocab_size=max(vocab_size, _FIRST_VOCABULARY),
    )


def plain_base_nll(store: Store) -> float:
    """Return the base's NLL of the held-out samples by the plain formula, in float32."""
    from carryon.train.data.split import split_of

    split = split_of(store, share=StreamSettings().held_out_ratio, seed=0)
    weight = torch.from_numpy(store.head().weight).view(torch.bfloat16)
    losses = []
    for sample in split.held_out.tolist():
        rows = store.read_sample(sample)
        states = torch.from_numpy(rows.hidden["final"]).view(torch.bfloat16).float()[:-1]
        targets = torch.from_numpy(rows.tokens[1:].astype(np.int64))
        logits = torch.cat(
            [states @ block.float().t() for block in torch.split(weight, _ROWS_AT_ONCE)], dim=1
        )
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return float(torch.cat(losses).double().mean())
