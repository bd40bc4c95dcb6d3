"""Speed of an import of many small files, from a cold page cache, against the disk's own."""

import os
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

from carryon.cache.base.model import Base
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.files.regular import open_below
from carryon.cache.store.reader import Store
from carryon.tools.bench.disk import flush, measure_folder
from carryon.tools.bench.exchange.state_files import write_states
from carryon.tools.bench.job import Job

TARGET_MB_PER_S = 300.0
OF_THE_DISK = 0.8
_DISTINCT = 64
"""Samples that the base computes; their files are repeated under other names."""
_TOKENS = (40, 140)


def measure_import(job: Job, *, files: int = 10_000) -> None:
    """Report MB of files a second, from the listing of the folder to the last receipt.

    The target is 300 MB/s, or 0.8 of what the disk does by itself, if that is less: the time to
    read the same files and to write the same bytes as the store's, in one pass each.
    """
    base = job.load_base()
    folder = _make_files(job.work / "files", base, files)
    num_files, num_bytes = measure_folder(folder)
    flush(folder)
    _forget(folder)
    settings = ImportSettings(layer_ids=[1, base.identity.num_layers])
    started_at = time.perf_counter()
    plan = plan_import(folder, base=base, out=job.work / "store", imports=settings)
    planned_s = time.perf_counter() - started_at
    report = run_import(plan)
    elapsed_s = time.perf_counter() - started_at
    Store.open(job.work / "store")
    _forget(folder)
    read_s = _read_all(folder)
    write_s = _write(job.work / "written", measure_folder(job.work / "store")[1])
    rate, disk = (num_bytes / 1e6 / seconds for seconds in (elapsed_s, read_s + write_s))
    job.report(
        "exchange.import",
        rate,
        "MB/s",
        at_least=min(TARGET_MB_PER_S, OF_THE_DISK * disk),
        files=num_files,
        megabytes=num_bytes / 1e6,
        tokens=report.num_tokens,
        planned_s=planned_s,
        units_s=report.elapsed_s,
        elapsed_s=elapsed_s,
        disk_mb_per_s=disk,
        read_s=read_s,
        write_s=write_s,
        stored_mb=report.stored_bytes / 1e6,
        threads=torch.get_num_threads(),
    )


def _make_files(folder: Path, base: Base, num_files: int) -> Path:
    """Write files of pieces of Python's own source; file I has the piece I modulo 64."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    ids = np.array(base.tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    lengths = np.random.default_rng(0).integers(*_TOKENS, _DISTINCT)
    starts = np.cumsum(lengths) - lengths
    samples = [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    samples = [sample for sample in samples if len(sample)]
    layers = [1, base.identity.num_layers]
    write_states(folder, base, samples, layers=layers)
    contents = [path.read_bytes() for path in sorted(folder.iterdir())]
    for number in range(len(samples), num_files):
        name = f"request-{number}.safetensors"
        (folder / name).write_bytes(contents[number % len(contents)])
    return folder


def _forget(folder: Path) -> None:
    """Ask the system to drop the files below a folder from its page cache."""
    for path in folder.iterdir():
        handle = open_below(folder, path.name)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _read_all(folder: Path) -> float:
    started_at = time.perf_counter()
    for name in sorted(os.listdir(folder)):
        (folder / name).read_bytes()
    return time.perf_counter() - started_at


def _write(path: Path, num_bytes: int) -> float:
    block = np.random.default_rng(0).bytes(1 << 20)
    started_at = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started_at
