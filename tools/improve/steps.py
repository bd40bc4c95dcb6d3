"""Steps: commands run in this process, each once; its result is kept in a file."""

import io
import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedFileError, InputError, KnownDataError, NothingRightError
from carryon.cache.files.documents import parse_json, read_bounded, write_json
from carryon.tools.cli.main import CARRYON, call_command
from carryon.tools.cli.program import Program
from carryon.tools.improve.inputs import Files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step that is done."""

    name: str
    seconds: float
    """Of the process that finished it."""
    result: Any
    """As the command returns it; None if it found nothing to do."""


def run_step(
    path: Path,
    argv: Sequence[str],
    *,
    files: Files,
    may_be_empty: bool = False,
    program: Program = CARRYON,
) -> Step:
    """Run a command, logged as typed, unless `path` holds its result already.

    Args:
        path: of the result, in the folder of a round.
        argv: words after `carryon`, or the name of another program.
        files: digests of files that the command reads.
        may_be_empty: whether a sampling that finds nothing is a result, None.
        program: whose command it is.

    Raises:
        InputError: the result is that of other words or files.
        CarryOnError: as the command does; the same call resumes it.
    """
    logger.info(f"\n$ {program.prog} {shlex.join(argv)}")
    if path.exists():
        words = _relative(argv, path.parents[1])
        step = _read(path, words=words, files=files, may_be_empty=may_be_empty)
        logger.info(f"done before, in {step.seconds:,.0f} s")
        return step
    started_at = time.perf_counter()
    result: Any = None
    try:
        with redirect_stdout(io.StringIO()):
            call = call_command if program is CARRYON else program.call
            result = call(argv[0], argv[1:])
    except NothingRightError as error:
        if not may_be_empty:
            raise
        logger.warning(str(error))
    except KnownDataError as error:  # stopped between the end of the append and this file
        logger.info(str(error))
    seconds = time.perf_counter() - started_at
    document = {"argv": _relative(argv, path.parents[1]), "files": dict(files)}
    write_json(path, {**document, "seconds": seconds, "result": _plain(result)})
    return Step(name=argv[0], seconds=seconds, result=result)


def _is_sampling(result: Any) -> bool:  # noqa: ANN401
    return isinstance(result, Mapping) and type(result["kept"]) is int and result["kept"] >= 0


def _is_score(result: Any) -> bool:  # noqa: ANN401
    """Return whether a result of `carryon score` has counts that can be."""
    return bool(result) and all(
        bool(document["arms"])
        and all(
            isinstance(arm["arm"], str)
            and type(arm["problems"]) is int
            and isinstance(arm["right"], int | float)
            and 0 <= arm["right"] <= arm["problems"] > 0
            for arm in document["arms"]
        )
        for document in result
    )


_CHECKS: Mapping[str, Callable[[Any], bool]] = {"sample": _is_sampling, "score": _is_score}
"""Of the results that later steps read."""


def _plain(result: Any) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(result, default=str))


def _relative(argv: Sequence[str], root: Path) -> list[str]:
    """Return words with the paths of all rounds below their folder, which may be moved."""
    return [word.replace(f"{root}/", "") for word in argv]  # also in KEY=PATH


def _read(path: Path, *, words: Sequence[str], files: Files, may_be_empty: bool) -> Step:
    try:
        document = parse_json(read_bounded(path))
        if "files" in document:  # not in older ones
            _compare(path, document["argv"], words, document["files"], files)
        name, result = document["argv"][0], document["result"]
        check, is_empty = _CHECKS.get(name), result is None and may_be_empty
        if check and not is_empty and not check(result):
            raise ValueError("another result")
        return Step(
            name=name,
            seconds=float(document["seconds"]),
            result=result,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise DamagedFileError(f"{path}: expected the result of a step. Fix: remove it") from error


def _compare(
    path: Path, old_words: Sequence[str], words: Sequence[str], old_files: Files, files: Files
) -> None:
    """Refuse a result of other words or files.

    Raises:
        InputError: the first difference.
    """
    for old, new in zip_longest(old_words, words, fillvalue=""):
        if old != new:
            raise InputError(
                f"{path}: expected the result of this command, got that of one with {old!a:.80} "
                f"in place of {new!a:.80}. Fix: give another --out"
            )
    for name in dict.fromkeys([*old_files, *files]):
        if old_files.get(name) != files.get(name):
            raise InputError(
                f"{name}: expected the file that {path} was made with, got a changed one. "
                "Fix: restore it, or give another --out"
            )
