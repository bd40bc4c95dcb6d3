"""Peak memory to train a large carry-on on a large base: the trainer itself, in a fresh process.

Counted is anonymous memory above that of an interpreter that has imported torch. The store is made
up; its head is as large as a real one. Letters: D width, V vocabulary.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryon.cache.device import pick_head_dtype
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import StateSet
from carryon.tools.bench.train import TrainJob
from carryon.tools.bench.train_settings import BenchTrainSizes
from carryon.tools.compare.figure import Figure
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    StreamSettings,
    TrainSettings,
)
from carryon.train.trainer.memory_estimate import MemoryCase, plan_memory

TARGET_GB = 0.75
PLAN_TARGET = 0.15
"""What `carryon plan-memory` may be off by, either way, in parts of what is measured."""
_SAMPLES_A_STEP = 8
_HELD_OUT = 1
_FIRST_VOCABULARY = 256  # rows that the made-up probe looks at
_ROWS_AT_ONCE = 8192  # of the head, in float32
_LOSS = LossSettings(head_place="mapped")
_MEMORY = MemorySettings(
    weights_dtype="bfloat16", optimizer_bits=8, step_in_backward=True, recompute=True
)

_IN_A_FRESH_PROCESS = """
import json, sys
import torch
from carryon.tools.compare.peak_memory import anonymous_bytes
before = anonymous_bytes()
from carryon.tools.bench.memory import train_watched
print(json.dumps(train_watched(json.loads(sys.argv[1]), before=before)))
"""


def measure_memory(job: TrainJob) -> None:
    """Report the peak, whether the loss is the plain formula's, and how far off the plan is."""
    sizes = job.sizes
    root = job.work / "store"
    write_large_store(
        root,
        width=sizes.memory_width,
        vocab_size=sizes.memory_vocabulary,
        step_tokens=sizes.memory_tokens,
        num_steps=sizes.memory_steps,
    )
    request = {
        "store": str(root),
        "out": str(job.work / "run"),
        "carryon": carryon_shape(sizes.memory_carryon_width).to_dict(),
        "tokens_per_step": sizes.memory_tokens,
    }
    command = [sys.executable, "-c", _IN_A_FRESH_PROCESS, json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    plain = plain_base_nll(Store.open(root))
    job.report(
        Figure(
            figure="memory.peak",
            value=found["peak_bytes"] / 1e9,
            unit="GB",
            target=TARGET_GB,
            details={
                "hard_limit_gb": 1.0,
                **found,
                "base_nll_plain": plain,
                "base_nll_error": abs(found["base_nll"] - plain),
            },
        )
    )
    parts = plan_memory(_case(sizes))
    ratio = sum(parts.values()) / found["peak_bytes"]
    job.report(
        Figure(
            figure="memory.plan",
            value=abs(ratio - 1),
            unit="of the measured peak, too much or too little",
            target=PLAN_TARGET,
            details={
                "ratio": ratio,
                "planned_bytes": sum(parts.values()),
                "measured_bytes": found["peak_bytes"],
                "parts": parts,
            },
        )
    )


def _case(sizes: BenchTrainSizes) -> MemoryCase:
    """Return what `carryon plan-memory` would be told of this run."""
    head_dtype = pick_head_dtype(_LOSS.head_dtype, torch.device("cpu"))
    return MemoryCase(
        base_width=sizes.memory_width,
        vocab_size=sizes.memory_vocabulary,
        micro_batch_tokens=sizes.memory_tokens,
        supervised_ratio=1 - _SAMPLES_A_STEP / sizes.memory_tokens,  # not a sample's first token
        window_tokens=sizes.memory_tokens,
        head_bytes=head_dtype.itemsize,
        carryon=carryon_shape(sizes.memory_carryon_width),
        loss=_LOSS,
        memory=_MEMORY,
    )


def carryon_shape(width: int) -> CarryOnSettings:
    """Return a carry-on whose MLP is 2.6 times as wide as its blocks: 100M weights at 1,760."""
    heads = next(heads for heads in (16, 8, 4, 2, 1) if width % (2 * heads) == 0)
    return CarryOnSettings(width=width, heads=heads, intermediate_size=int(2.6 * width))


def train_watched(request: Mapping[str, Any], *, before: int) -> dict[str, Any]:
    """Train as `carryon train` does, in little memory; return the peak above `before`."""
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
    """Write a store of random states, of as many tokens as `num_steps` steps take."""
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
    from carryon.train.data.split import split_samples

    settings = StreamSettings()
    split = split_samples(
        store.sample_held_out,
        share=settings.held_out_ratio,
        seed=0,
        digest=store.samples_digest,
    )
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
