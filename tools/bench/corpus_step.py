"""The step from files to samples: right targets, speed, memory, and what a second reading costs."""

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from carryon.cache.base.loading import read_tokenizer
from carryon.cache.base.source.location import locate_base
from carryon.cache.corpus.dataset import read_corpus
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings
from carryon.tools.bench.corpora import PYDOC, write_named_corpus
from carryon.tools.bench.job import Job, in_turn, run_fresh

RIGHT_TARGET, WRONG_TARGET, PLAIN_TARGET = 0.95, 0, 0
TWO_PROCESSES_TARGET, AGAINST_MAP_TARGET = 1.7, 0.8
MEMORY_TARGET_GB = 0.6
LONG_CHAT_TARGET = 1.5
RESUME_TARGET_S = 5.0
_TESTS = Path(__file__).resolve().parents[2] / "tests"
_WORDS = 400
"""Of a made record's text."""


def measure_templates(job: Job) -> None:
    """Score the stock templates of the tests, each case with each kind of tokenizer."""
    sys.path.insert(0, str(_TESTS))
    score_templates = importlib.import_module("support.template_scores").score_templates
    kinds = importlib.import_module("support.chat_tokenizers").KINDS
    os.environ["CARRYON_CACHE"] = str(job.work / "cache")
    scores = {kind: score_templates(kind) for kind in kinds}
    cells = sum(score["cells"] for score in scores.values())
    details = {
        "templates": scores[kinds[0]]["templates"],
        "cells": cells,
        "true_refusals": sum(score["true_refusals"] for score in scores.values()),
        "faults": [fault for score in scores.values() for fault in score["faults"]][:20],
    }
    right = sum(score["right"] for score in scores.values())
    job.report("templates.right", right / cells, "of cells", at_least=RIGHT_TARGET, **details)
    wrong = sum(score["wrong"] for score in scores.values())
    job.report("templates.wrong", wrong, "cells", at_most=WRONG_TARGET)
    plain = sum(score["plain_refused"] for score in scores.values())
    job.report("templates.plain_refused", plain, "two-turn chats", at_most=PLAIN_TARGET)


def measure_tokenizing(job: Job, *, megabytes: int = 24, rounds: int = 3) -> None:
    """Compare two processes with one, and both kinds of records with `datasets.map`."""
    for kind in ("text", "messages"):
        path = job.work / f"{kind}.jsonl"
        _write_rows(path, kind=kind, num_bytes=megabytes << 20)
        seconds = _time_readings(job, path, kind=kind, rounds=rounds)
        details = {f"{name.replace(' ', '_')}_s": value for name, value in seconds.items()}
        job.report(
            f"tokenize.{kind}.processes",
            seconds["one process"] / seconds["two processes"],
            "times one process",
            at_least=TWO_PROCESSES_TARGET,
            **details,
        )
        job.report(
            f"tokenize.{kind}.against_map",
            seconds["datasets map"] / seconds["two processes"],
            "of the speed of datasets.map",
            at_least=AGAINST_MAP_TARGET,
        )


def measure_memory(job: Job, *, megabytes: int = 2048, text_megabytes: int = 100) -> None:
    """Compare the peak memory of all processes with that of a corpus of one record."""
    peaks = {}
    for name, kind, num_bytes in (
        ("nothing", "messages", 1),
        ("text", "document", text_megabytes << 20),
        ("rows", "messages", megabytes << 20),
    ):
        path = job.work / (f"{name}.txt" if kind == "document" else f"{name}.jsonl")
        _write_rows(path, kind=kind, num_bytes=num_bytes)
        peaks[name] = _peak_of_reading(job, path)
        path.unlink()
    for name, label in (("rows", f"{megabytes} MB of JSON lines"), ("text", "one document")):
        job.report(
            f"memory.{name}",
            (peaks[name]["gigabytes"] - peaks["nothing"]["gigabytes"]),
            "GB over an empty corpus",
            at_most=MEMORY_TARGET_GB,
            of=label,
            seconds=peaks[name]["seconds"],
            empty_gb=peaks["nothing"]["gigabytes"],
            private_gb=peaks[name]["private"] - peaks["nothing"]["private"],
        )


def measure_long_chats(job: Job, *, turns: int = 800, parts: int = 8, rounds: int = 3) -> None:
    """Compare one conversation with the same number of turns in several."""
    texts = _texts(job.work, words=12)
    answers = [
        [{"role": "user", "content": next(texts)}, {"role": "assistant", "content": next(texts)}]
        for _ in range(turns)
    ]
    step = turns // parts
    rows = {
        "one": [[message for pair in answers for message in pair]],
        "several": [
            [message for pair in answers[first : first + step] for message in pair]
            for first in range(0, turns, step)
        ],
    }
    tokenizer = read_tokenizer(locate_base(job.base))

    def reader(name: str) -> Callable[[], float]:
        path = job.work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in rows[name]))
        return lambda: _read(job, path, tokenizer, workers=1, max_tokens=1 << 20)

    seconds = in_turn({name: reader(name) for name in rows}, rounds=rounds)
    job.report(
        "long_chat",
        seconds["one"] / seconds["several"],
        f"times {parts} chats of {step} turns",
        at_most=LONG_CHAT_TARGET,
        one_s=seconds["one"],
        several_s=seconds["several"],
    )


_SECOND = """
import json, sys, time
from carryon.cache.extraction import pipeline

class Begun(Exception):
    pass

def begin(*arguments, **settings):
    raise Begun

pipeline.run_units = begin
from carryon.cache import extract
started_at = time.perf_counter()
try:
    extract(base=sys.argv[1], data=sys.argv[2], out=sys.argv[3], max_tokens=64)
except Begun:
    print(json.dumps({"seconds": time.perf_counter() - started_at}))
"""


def measure_resuming(job: Job, *, records: int = 1_000_000, rounds: int = 3) -> None:
    """Measure the seconds from a second `extract` to its first unit, the base a tiny one."""
    sys.path.insert(0, str(_TESTS))
    base = importlib.import_module("support.tiny_bases").make_tiny_base(job.work / "base")
    path = job.work / "records.jsonl"
    with path.open("w") as stream:
        for number in range(records):
            stream.write(json.dumps({"prompt": f"{number} + 1 =", "completion": f" {number + 1}"}))
            stream.write("\n")
    os.environ["CARRYON_CACHE"] = str(job.work / "cache")
    call = (str(base), str(path), str(job.work / "store"))
    first = run_fresh(_SECOND, *call)["seconds"]
    again = [run_fresh(_SECOND, *call)["seconds"] for _ in range(rounds)]
    job.report(
        "resume",
        statistics.median(again),
        "s before the first unit",
        at_most=RESUME_TARGET_S,
        records=records,
        first_s=first,
        other_store_s=run_fresh(_SECOND, *call[:2], str(job.work / "other"))["seconds"],
    )


def _time_readings(job: Job, path: Path, *, kind: str, rounds: int) -> dict[str, float]:
    """Return the seconds of each way to tokenize a file."""
    import datasets

    tokenizer = read_tokenizer(locate_base(job.base))
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_json(str(path), cache_dir=str(job.work / "datasets"))

    def with_map() -> float:
        def tokenize(batch: Any) -> Any:  # noqa: ANN401 -- of datasets
            if kind == "text":
                return tokenizer(batch["text"])
            texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
            return tokenizer(texts, add_special_tokens=False)

        started_at = time.perf_counter()
        table.map(
            tokenize,
            batched=True,
            num_proc=2,
            remove_columns=table.column_names,
            load_from_cache_file=False,
            new_fingerprint=f"{time.time_ns():x}",
        )
        return time.perf_counter() - started_at

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process has one core in every way
    return in_turn(
        {
            "one process": lambda: _read(job, path, tokenizer, workers=1),
            "two processes": lambda: _read(job, path, tokenizer, workers=2),
            "datasets map": with_map,
        },
        rounds=rounds,
    )


def _read(
    job: Job,
    path: Path,
    tokenizer: Any,  # noqa: ANN401 -- of transformers
    *,
    workers: int,
    max_tokens: int = 2048,
) -> float:
    """Read a corpus without a cache; return the seconds."""
    folder = job.work / "samples-of-one-reading"
    shutil.rmtree(folder, ignore_errors=True)
    started_at = time.perf_counter()
    read_corpus(
        [path],
        tokenizer,
        settings=CorpusSettings(),
        data_settings=DataSettings(tokenizer_workers=workers),
        max_tokens=max_tokens,
        folder=folder,
    )
    elapsed_s = time.perf_counter() - started_at
    shutil.rmtree(folder)
    return elapsed_s


_READ = """
import sys
from pathlib import Path
from carryon.cache.base.loading import read_tokenizer
from carryon.cache.base.source.location import locate_base
from carryon.cache.corpus.dataset import read_corpus
from carryon.cache.settings import CorpusSettings, DataSettings
read_corpus([sys.argv[1]], read_tokenizer(locate_base(sys.argv[2])), settings=CorpusSettings(),
            max_tokens=2048, folder=Path(sys.argv[3]))
"""


def _peak_of_reading(job: Job, path: Path) -> dict[str, float]:
    """Return the peak of the memory of a process that reads a corpus, with its workers.

    Shared pages are counted once: `gigabytes` with those of mapped files, `private` without.
    """
    folder = job.work / "samples-of-one-reading"
    started_at = time.perf_counter()
    command = [sys.executable, "-c", _READ, str(path), job.base, str(folder)]
    peaks = {"gigabytes": 0.0, "private": 0.0}
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            with suppress(OSError):  # a process may end between two lines
                memory = [_memory(each) for each in _processes(process.pid)]
                for name, values in zip(peaks, zip(*memory, strict=True), strict=True):
                    peaks[name] = max(peaks[name], sum(values) / 1e9)
            time.sleep(0.05)
    if process.returncode:
        raise InputError(f"{path}: expected it to be read, got exit code {process.returncode}")
    shutil.rmtree(folder)
    return {**peaks, "seconds": time.perf_counter() - started_at}


def _processes(process: int) -> list[int]:
    """Return a process and all that it has started, and they."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(each for child in children for each in _processes(int(child)))]


def _memory(process: int) -> tuple[int, int]:
    """Return the resident bytes of a process, its share of shared pages counted; private ones."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return values["Pss"], values["Private_Clean"] + values["Private_Dirty"]


def _write_rows(path: Path, *, kind: str, num_bytes: int) -> None:
    """Write a file of about this size: chats, texts, or one document."""
    texts = _texts(path.parent, words=_WORDS)
    with path.open("w", encoding="utf-8") as stream:
        while True:
            text = next(texts)
            half = len(text) // 2
            row: dict[str, Any] = {"text": text}
            if kind == "messages":
                sides = (("user", text[:half]), ("assistant", text[half:]))
                row = {"messages": [{"role": role, "content": side} for role, side in sides]}
            stream.write(f"{text}\n" if kind == "document" else f"{json.dumps(row)}\n")
            if stream.tell() >= num_bytes:
                return


def _texts(folder: Path, *, words: int) -> Iterator[str]:
    """Yield texts of real words without end, each different."""
    path = folder / "words.jsonl"
    if not path.exists():
        write_named_corpus(PYDOC, path, num_tokens=100_000)
    pool = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    every = " ".join(pool).split(" ")
    number = 0
    while True:
        first = number * words % max(1, len(every) - words)
        yield f"{number}: {' '.join(every[first : first + words])}"
        number += 1
