"""Throughput of StoreDataset against the stream that training reads."""

import time

from carryon.cache.settings import StoreSettings
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states
from carryon.train.config import StreamSettings
from carryon.train.data.datasets import plan_store_epoch
from carryon.train.data.loader import Stream
from carryon.train.data.store_dataset import StoreDataset

TARGET = 0.98


def measure_dataset(
    job: Job,
    *,
    samples: int = 192,
    width: int = 2560,
    taps: int = 2,
    mean_tokens: int = 588,
    max_tokens: int = 2048,
    unit_tokens: int = 8192,
    batch_tokens: int = 4096,
    rounds: int = 9,
) -> None:
    """Report the tokens/s of one epoch, each warm and in turn."""
    states = make_states(
        "dataset",
        num_samples=samples,
        width=width,
        num_taps=taps,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        seed=0,
    )
    root = job.work / "store"
    write_scratch_store(
        root, states, settings=StoreSettings(taps=states.taps, unit_tokens=unit_tokens)
    )
    dataset, settings = StoreDataset(root, batch_tokens=batch_tokens), StreamSettings()
    store = dataset.store

    def read_dataset() -> float:
        started_at = time.perf_counter()
        tokens = sum(len(batch["input_ids"]) for batch in dataset)
        return tokens / (time.perf_counter() - started_at)

    def read_stream() -> float:
        started_at = time.perf_counter()
        windows = plan_store_epoch(
            store,
            dataset.samples,
            seed=0,
            epoch=0,
            tokens_per_step=batch_tokens,
            micro_batch_tokens=0,
            window_units=settings.window_units,
        )
        stream = Stream(store, windows, taps=dataset.taps, settings=settings, is_pinned=False)
        with stream as steps:
            tokens = sum(batch.num_tokens for [batch] in steps)
        return tokens / (time.perf_counter() - started_at)

    read_dataset(), read_stream()  # warm
    speeds = in_turn({"dataset": read_dataset, "stream": read_stream}, rounds=rounds)
    job.report(
        "dataset.speed",
        speeds["dataset"] / speeds["stream"],
        "of the trainer's stream",
        at_least=TARGET,
        tokens_per_second=speeds["dataset"],
        stream_tokens_per_second=speeds["stream"],
        width=width,
        taps=taps,
    )
