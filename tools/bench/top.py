"""Steps of a `top`, whole and by LoRA, from a store, beside LoRA on the whole base."""

from carryon.cache.base.model import load_base
from carryon.cache.device import pick_device
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.lora import (
    RANK,
    base_steps,
    carryon_steps,
    padded_rows,
    take_batches,
    timed,
)
from carryon.tools.bench.merge_job import MergeJob
from carryon.tools.compare.figure import Figure, in_turn
from carryon.train.config import rates_of
from carryon.train.modules.carryon import build_carryon

TARGET = 3.0


def measure_speed(job: MergeJob) -> None:
    """Report how many times faster than LoRA's the steps of a `top` are, on the same batches."""
    store, sizes, shape = Store.open(job.store), job.sizes, job.shape("top")
    batches = take_batches(job.store, sizes.batch_tokens, count=sizes.steps, taps=shape.taps)
    device = pick_device("auto")
    ways = {}
    for name in ("top", "top-lora"):
        carryon = build_carryon(job.shape(name), store, seed=0).to(device)
        rate = rates_of(carryon.settings)[0]
        ways[name] = timed(carryon_steps(carryon, store, batches, learning_rate=rate))
    base = load_base(job.base, forward=ForwardSettings())
    ways["lora"] = timed(base_steps(base, [padded_rows(batch) for batch in batches], has_lora=True))
    seconds = in_turn(ways, rounds=sizes.rounds)
    num_tokens = sum(batch.num_tokens for batch in batches)
    for name, target in (("top", TARGET), ("top-lora", None)):
        job.report(
            Figure(
                figure=f"{name}.speed",
                value=seconds["lora"] / seconds[name],
                unit="of LoRA's tokens/s",
                target=target,
                sense="at least",
                details={
                    "tokens_per_second": {way: num_tokens / each for way, each in seconds.items()},
                    "tokens": num_tokens,
                    "targets": sum(batch.num_targets for batch in batches),
                    "blocks": shape.blocks,
                    "blocks_of_base": base.identity.num_layers,
                    "rank": RANK,
                    "dtype": str(base.compute_dtype),
                },
            )
        )
