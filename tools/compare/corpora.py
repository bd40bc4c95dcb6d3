"""Corpora that every machine can make, or that are there: problems, code, reference pages."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.errors import InputError
from carryon.cache.files import write_file
from carryon.tools.demo.corpus import make_corpus

GSM = "gsm"
PYTHON = "python"
PYDOC = "pydoc"
MANPAGES = "manpages"
_GSM_TOKENS = 190
"""Tokens of a problem with its worked answer, on average."""
_CHARACTERS_PER_TOKEN = {PYTHON: 3.9, PYDOC: 4.0, MANPAGES: 3.6}
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "lib2to3", "pydoc_data"}
"""Folders that hold no library, or little but tables."""
_MAN = Path("/usr/share/man")
_PAGES_A_FAMILY = 2
"""Manual pages whose names begin alike (git-add, git-am) repeat each other."""
_PAGE_CHARACTERS = 12_000
"""Of a page, at most: a few are books."""
_PAGES_AT_ONCE = 8


def write_named_corpus(name: str, path: Path, *, num_tokens: int) -> None:
    """Write a corpus of about `num_tokens` tokens to `path` as JSON lines.

    Args:
        name: `gsm`, `python` (its standard library), `pydoc` (its reference documentation) or
            `manpages` (English manual pages of this system).
        path: of the file.
        num_tokens: of a tokenizer of about 50,000 tokens.

    Raises:
        InputError: no corpus of this name, or this system has no manual pages.
        MissingExtraError: gsm, and reasoning-gym is not installed.
    """
    if name == GSM:
        records = make_corpus(max(8, num_tokens // _GSM_TOKENS))
    elif name in _DOCUMENTS:
        documents = _DOCUMENTS[name]()
        records = _take(documents, num_characters=int(num_tokens * _CHARACTERS_PER_TOKEN[name]))
    else:
        raise InputError(
            f"corpus {name!r}: expected {GSM}, {', '.join(_DOCUMENTS)}, or LABEL=PATH of files of "
            "your own"
        )
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _take(documents: Iterator[tuple[str, str]], *, num_characters: int) -> Iterator[dict[str, Any]]:
    """Yield documents as records until they have so many characters."""
    left = num_characters
    for name, text in documents:
        if left <= 0:
            return
        if text.strip():
            yield {"id": name, "text": text[:left]}
            left -= len(text)


def _read_standard_library() -> Iterator[tuple[str, str]]:
    """Yield modules with their docstrings and code, in a seeded random order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_list_modules(root))
    for index in np.random.default_rng(0).permutation(len(paths)).tolist():
        text = paths[index].read_text(encoding="utf-8", errors="replace")
        yield paths[index].relative_to(root).as_posix(), text


def _list_modules(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _read_reference() -> Iterator[tuple[str, str]]:
    """Yield the topics of Python's reference documentation, in a seeded random order."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    for index in np.random.default_rng(0).permutation(len(names)).tolist():
        yield names[index], topics[names[index]]


def _read_manual() -> Iterator[tuple[str, str]]:
    """Yield manual pages as plain text, in a seeded random order, a few of each family."""
    paths = [path for path in sorted(_MAN.glob("man[1-9]/*")) if not path.is_symlink()]
    if shutil.which("man") is None or not paths:
        raise InputError(
            f"corpus {MANPAGES}: expected the program man, and pages below {_MAN}: take pydoc"
        )
    shuffled = [paths[index] for index in np.random.default_rng(0).permutation(len(paths)).tolist()]
    seen: Counter[str] = Counter()
    chosen = []
    for path in shuffled:
        family = re.split(r"[-_.:]", path.name.lower())[0]
        seen[family] += 1
        if seen[family] <= _PAGES_A_FAMILY:
            chosen.append(path)
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(chosen), _PAGES_AT_ONCE):
            some = chosen[first : first + _PAGES_AT_ONCE]
            yield from zip(
                (f"{path.parent.name}/{path.name.removesuffix('.gz')}" for path in some),
                pool.map(_render_page, some),
                strict=True,
            )


def _render_page(path: Path) -> str:
    """Return a page as plain text without its margin and running heads; empty if it is a link."""
    command = ["man", "--nh", "--nj", "-E", "ascii", "-P", "cat", str(path)]
    environment = os.environ | {"MANWIDTH": "80", "LC_ALL": "C"}
    text = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    ).stdout
    lines = [re.sub(r"^ {7}", "", line.rstrip()) for line in text.strip().splitlines()[1:-1]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()[:_PAGE_CHARACTERS]


_DOCUMENTS = {PYTHON: _read_standard_library, PYDOC: _read_reference, MANPAGES: _read_manual}
