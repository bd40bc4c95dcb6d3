"""Documents with any change, signed again: each command ends well or with one line.

Many documents are tried in one process, one after the other, which notes what it begins. A command
that takes too long ends the process.
"""

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Call, Limits, changed_paths
from carryon.tools.bench.trust.documents import group_of, make_given, make_hostile
from carryon.tools.bench.trust.table import make_things

MAX_SECONDS = 5
"""Of the processor, which other work on the machine does not change."""
_MAX_WAIT_S = 60
"""After which a command hangs that needs no processor."""
MAX_MEGABYTES = 1000
_KINDS = ("traceback", "hang", "outside", "memory", "escape")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OWN_FAULT = 99
_MEMORY_LIMIT = 4 << 30
"""Where a command is stopped, for the sake of the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is not to happen."""

    kind: str
    number: int
    document: str
    change: str
    command: str
    text: str


def measure_documents(
    job: Job, *, documents: int = 5000, first: int = 0, chunk: int = 40, processes: int = 2
) -> None:
    """Let every command read documents with a change each, and count what is not to happen."""
    things = make_things(job.work / "made")
    given = job.work / "given"
    given.mkdir()
    make_given(things, given)
    numbers = range(first, first + documents)
    chunks = [numbers[start : start + chunk] for start in range(0, documents, chunk)]
    with ThreadPoolExecutor(processes) as pool:
        lines = [
            line
            for lines in pool.map(partial(_try_chunk, job.work, given), chunks)
            for line in lines
        ]
    faults = faults_of(lines)
    for kind in _KINDS:
        found = [fault for fault in faults if fault.kind == kind]
        shown = [
            f"{fault.number}: {fault.document}: {fault.change}: {fault.command}: {fault.text}"
            for fault in found
        ]
        if kind == "memory":
            peak = max((line["peak_mb"] for line in lines), default=0.0)
            job.report(
                "trust.documents.memory", peak, "MB at most", at_most=MAX_MEGABYTES, failures=shown
            )
        else:
            job.report(
                f"trust.documents.{kind}s" if kind != "outside" else "trust.documents.outside",
                len(found),
                f"of {len({line['number'] for line in lines})} documents, {len(lines)} commands",
                at_most=0,
                failures=shown,
            )


def faults_of(lines: Sequence[dict[str, Any]]) -> list[Fault]:
    """Return the faults among the outcomes of commands."""
    return [
        Fault(
            kind=kind,
            text=text,
            **{key: line[key] for key in ("number", "document", "change", "command")},
        )
        for line in lines
        for kind, text in line["faults"].items()
    ]


def _try_chunk(work: Path, given: Path, numbers: range) -> list[dict[str, Any]]:
    """Try documents in a process, and in new ones behind each that ends it."""
    lines: list[dict[str, Any]] = []
    start, skipped = numbers.start, 0
    while start < numbers.stop:
        cwd = work / f"chunk-{start}-{skipped}"
        cwd.mkdir()
        function = partial(try_documents, given, range(start, numbers.stop), skipped)
        limits = Limits(seconds=60 * len(numbers))
        ended = Call(["documents"], cwd=cwd, limits=limits, function=function).wait()
        notes = cwd / "outcomes.jsonl"
        found = (
            [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        )
        lines += [line for line in found if "faults" in line]
        shutil.rmtree(cwd)
        if ended.code == 0:
            break
        if ended.code == _OWN_FAULT or not found:
            raise RuntimeError(
                f"documents {start} to {numbers.stop} ended with {ended.code}: {ended.err}"
            )
        last = found[-1]
        if "faults" not in last:  # it ended the process; otherwise that asked for a new one
            kind = "hang" if "most recent call first" in ended.err else "traceback"
            text = " | ".join(ended.err.strip().splitlines()[-30:])[:1500]
            faults = {kind: f"code {ended.code}: {text}"}
            lines.append(last | {"faults": faults, "peak_mb": ended.peak_mb})
        start, skipped = last["number"], last["place"] + 1
    return lines


def try_documents(given: Path, numbers: range, skipped: int) -> None:
    """Try documents in this process; the notes of it lie in its folder.

    Args:
        given: folder of the things of which documents are changed.
        numbers: of the documents.
        skipped: commands of the first document that have been tried.
    """
    import transformers

    changed: list[str] = []
    sys.addaudithook(lambda event, arguments: changed.extend(changed_paths(event, arguments)))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_LIMIT, resource.RLIM_INFINITY))
    transformers_log: Any = transformers.utils.logging
    transformers_log.disable_progress_bar()  # it imported tqdm before this process began
    home = Path.cwd()
    with (home / "outcomes.jsonl").open("w") as notes:
        for number in numbers:
            folder = home / f"document-{number}"
            commands = group_of(number).commands
            for place, (text, out) in enumerate(commands.items()):
                if number == numbers.start and place < skipped:
                    continue
                make_canaries(folder)
                line: dict[str, Any] = {"number": number, "place": place, "command": text}
                _note(notes, line | {"document": "unknown", "change": "while it was signed"})
                document, change = make_hostile(given, folder, number)
                line |= {"document": document, "change": change}
                _note(notes, line)
                line |= _try_command(text.split(), folder, out, changed)
                _note(notes, line)
                if line["peak_mb"] > MAX_MEGABYTES:
                    os._exit(3)  # the peak of a process does not fall
                os.chdir(home)
                shutil.rmtree(folder)


def _note(notes: io.TextIOWrapper, line: dict[str, Any]) -> None:
    notes.write(json.dumps(line) + "\n")
    notes.flush()


def make_canaries(folder: Path) -> None:
    """Make a folder for things, with a file of the user in it and one beside it."""
    folder.mkdir()
    for path in (folder.parent / "canary", folder / "canary"):
        path.write_text("of the user")


def _try_command(words: list[str], folder: Path, out: str, changed: list[str]) -> dict[str, Any]:
    """Run one command and return its outcome."""
    from carryon.tools.cli.main import main

    os.chdir(folder)
    before = entries_of(folder, out)
    changed.clear()
    faults: dict[str, str] = {}
    written = io.BytesIO(), io.BytesIO()
    shown = [io.TextIOWrapper(each, "utf-8", "backslashreplace") for each in written]
    started_at = time.perf_counter()
    faulthandler.register(signal.SIGPROF, file=2, chain=True)  # it then ends the process
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    faulthandler.dump_traceback_later(_MAX_WAIT_S, exit=True, file=2)
    code: object = 99
    with contextlib.redirect_stdout(shown[0]), contextlib.redirect_stderr(shown[1]):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_PROF, 0)
    took_s = time.perf_counter() - started_at
    for stream in shown:
        stream.flush()
    texts = [each.getvalue().decode() for each in written]
    lines = texts[1].strip().splitlines()
    if code not in (0, 1, 2) or "Traceback (most recent call last)" in texts[1]:
        faults["traceback"] = f"code {code}: {' | '.join(lines[-6:])[-800:]}"
    elif code == 2 and (not lines or ": error: " not in lines[-1]):
        faults["traceback"] = f"code 2 without its reason: {' | '.join(lines[-6:])[-800:]}"
    if bad := _CONTROL.search("".join(texts)):
        line = next(each for each in "\n".join(texts).split("\n") if bad[0] in each)
        faults["escape"] = f"{line!a:.800}"
    paths = {path for path in changed if not _may_change(path, folder, out)}
    after = entries_of(folder, out)
    paths |= {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if paths:
        faults["outside"] = " ".join(sorted(paths))[:800]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    if peak_mb > MAX_MEGABYTES:
        faults["memory"] = f"{peak_mb:.0f} MB"
    last = lines[-1][-200:] if lines else ""
    return {"code": code, "last": last, "seconds": took_s, "peak_mb": peak_mb, "faults": faults}


def entries_of(folder: Path, out: str) -> dict[str, tuple[Any, ...]]:
    """Return what lies in a folder, and the canary beside it, but for what is to be written."""
    found = {}
    stack = [str(folder)]
    canary = str(folder.parent / "canary")
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                name = os.path.relpath(entry.path, folder)
                if name == out:
                    continue
                found[name] = _facts(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
    return found | {"../canary": _facts(canary)}


def _facts(path: str) -> tuple[Any, ...]:
    facts = os.lstat(path)
    return facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ino


def _may_change(path: str, folder: Path, out: str) -> bool:
    allowed = [folder.parent / "home", folder.parent / "tmp", Path("/dev/null")]
    allowed += [folder / out] if out else []
    place = Path(os.path.realpath(os.path.dirname(path))) / os.path.basename(path)
    return any(place.is_relative_to(each) for each in allowed) or (
        bool(out) and _is_beside(place, folder / out)
    )


def _is_beside(place: Path, out: Path) -> bool:
    """Tell whether a path is in the partial or replaced form of what is to be written."""
    return any(
        each.parent == out.parent and each.name.startswith(f".{out.name}.")
        for each in (place, *place.parents)
    )
