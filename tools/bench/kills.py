"""Training killed at random instants: the resumed run ends with the same bits."""

import os
import random
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from carryon.cache.settings import StoreSettings
from carryon.tools.bench.job import Job
from carryon.tools.bench.processes import processes
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states


def measure_kills(job: Job, *, kills: int = 30) -> None:
    """Kill runs at random instants, resume each, and compare it with an undisturbed run."""
    states = make_states(
        "kills", num_samples=80, width=32, num_taps=1, mean_tokens=60, max_tokens=200, seed=0
    )
    store = job.work / "store"
    write_scratch_store(store, states, settings=StoreSettings(unit_tokens=1024))
    _finish(store, job.work / "first")  # starts the server that forks all later processes
    started_at = time.perf_counter()
    _finish(store, job.work / "whole")
    longest_s = time.perf_counter() - started_at
    expected = _weights(job.work / "whole")
    picks = random.Random(0)
    num_landed = num_survived = 0
    while num_landed < kills:
        out = job.work / "killed"
        process = _begin(store, out)
        process.join(picks.uniform(0.0, longest_s))
        was_running = process.exitcode is None
        num_landed += was_running
        process.kill()
        process.join()
        _finish(store, out)
        num_survived += was_running and _weights(out) == expected
        shutil.rmtree(out)
    job.report(
        "kills.survived",
        num_survived,
        f"of {num_landed}, to the bit",
        at_least=kills,
        killed_within_s=longest_s,
    )


def _weights(out: Path) -> bytes:
    return (out / "carryon" / "carryon.safetensors").read_bytes()


def _finish(store: Path, out: Path) -> None:
    process = _begin(store, out)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"training in {out} ended with exit code {process.exitcode}")


def _begin(store: Path, out: Path) -> Any:  # noqa: ANN401 -- a Process of some context
    ours, theirs = processes().Pipe()
    process = processes().Process(target=_train, args=(store, out, theirs))
    process.start()
    theirs.close()
    ours.recv()
    return process


def _train(store: Path, out: Path, talk: Connection) -> None:
    import torch

    from carryon.train.trainer.trainer import train

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- closed with the process
    torch.set_num_threads(1)
    talk.send("begun")
    train(
        store,
        out=out,
        width=16,
        intermediate_size=16,
        dropout=0.1,
        epochs=3,
        tokens_per_step=256,
        device="cpu",
        checkpoint_every=3,
        evaluate_every=5,
    )
