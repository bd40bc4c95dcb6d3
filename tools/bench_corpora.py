"""Corpora that every machine can make: GSM-symbolic problems, and Python's standard library."""

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.atomic import write_file
from carryon.cache.errors import InputError
from carryon.tools.demo_corpus import make_corpus

GSM = "gsm"
PYTHON = "python"
_GSM_TOKENS = 190
"""Tokens of a problem with its worked answer, on average."""
_CHARACTERS_PER_TOKEN = 3.9
"""Of Python source, on average."""
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "lib2to3", "pydoc_data"}
"""Folders that hold no library, or little but tables."""


def write_named_corpus(name: str, path: Path, *, num_tokens: int) -> None:
    """Write a corpus of about `num_tokens` tokens to `path` as JSON lines.

    Args:
        name: `gsm` or `python`.
        path: of the file.
        num_tokens: of a tokenizer of about 50,000 tokens.

    Raises:
        InputError: no corpus of this name.
        MissingExtraError: gsm, and reasoning-gym is not installed.
    """
    if name == GSM:
        records = make_corpus(max(8, num_tokens // _GSM_TOKENS))
    elif name == PYTHON:
        records = _read_standard_library(num_characters=int(num_tokens * _CHARACTERS_PER_TOKEN))
    else:
        raise InputError(
            f"corpus {name!r}: expected {GSM}, {PYTHON}, or LABEL=PATH of files of your own"
        )
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _read_standard_library(*, num_characters: int) -> Iterator[dict[str, Any]]:
    """Yield modules with their docstrings and code, in a seeded random order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_list_modules(root))
    left = num_characters
    for index in np.random.default_rng(0).permutation(len(paths)).tolist():
        text = paths[index].read_text(encoding="utf-8", errors="replace")
        if left <= 0:
            return
        if text.strip():
            yield {"id": paths[index].relative_to(root).as_posix(), "text": text[:left]}
            left -= len(text)


def _list_modules(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))
