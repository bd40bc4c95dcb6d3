"""Steps: commands run in this process, each once; its result is kept in a file."""

import io
import json
import logging
import shlex
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedFileError, KnownDataError, NothingRightError
from carryon.cache.files.documents import parse_json, read_bounded, write_json
from carryon.tools.cli.main import call_command

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step that is done."""

    name: str
    seconds: float
    """Of the process that finished it."""
    result: Any
    """As the command returns it; None if it found nothing to do."""


def run_step(path: Path, argv: Sequence[str], *, may_be_empty: bool = False) -> Step:
    """Run a command, logged as typed, unless `path` holds its result already.

    Args:
        path: of the result.
        argv: words after `carryon`.
        may_be_empty: whether a sampling that finds nothing is a result, None.

    Raises:
        CarryOnError: as the command does; the same call resumes it.
    """
    logger.info(f"\n$ {shlex.join(['carryon', *argv])}")
    if path.exists():
        step = _read(path)
        logger.info(f"done before, in {step.seconds:,.0f} s")
        return step
    started_at = time.perf_counter()
    result: Any = None
    try:
        with redirect_stdout(io.StringIO()):
            result = call_command(argv[0], argv[1:])
    except NothingRightError as error:
        if not may_be_empty:
            raise
        logger.warning(str(error))
    except KnownDataError as error:  # stopped between the end of the append and this file
        logger.info(str(error))
    seconds = time.perf_counter() - started_at
    write_json(path, {"argv": list(argv), "seconds": seconds, "result": _plain(result)})
    return Step(name=argv[0], seconds=seconds, result=result)


def _plain(result: Any) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(result, default=str))


def _read(path: Path) -> Step:
    try:
        document = parse_json(read_bounded(path))
        return Step(
            name=document["argv"][0],
            seconds=float(document["seconds"]),
            result=document["result"],
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DamagedFileError(f"{path}: expected the result of a step. Fix: remove it") from error
