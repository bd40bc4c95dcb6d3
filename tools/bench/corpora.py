"""Corpora for measurements: worked problems, code, reference and manual pages, documentation."""

import ast
import json
import os
import re
import shutil
import subprocess
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.tools.bench.gsm import make_corpus

GSM = "gsm"
PYTHON = "python"
PYDOC = "pydoc"
MANPAGES = "manpages"
MIXED = "mixed"
_GSM_TOKENS = 190
"""Mean tokens of a problem with its worked answer."""
_CHARACTERS_PER_TOKEN = {PYTHON: 3.9, PYDOC: 4.0, MANPAGES: 3.6, MIXED: 3.7}
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "encodings", "lib2to3", "pydoc_data"}
"""Folders of tests and tables."""
_MAN = Path("/usr/share/man")
_DOCUMENTATION = (".md", ".rst", ".py")
_CODE = ("```", "::\n\n", ">>> ")
"""Each marks code within prose."""
_LEAST_CHARACTERS = 2_000
"""Of the documentation in a file."""
_PAGES_A_PACKAGE = 12
"""Pages of one package repeat each other."""
_PAGES_A_FAMILY = 2
"""Manual pages with the same first word (git-add, git-am) repeat each other."""
_PAGE_CHARACTERS = 12_000
"""Longest page."""
_PAGES_AT_ONCE = 8


def write_named_corpus(name: str, path: Path, *, num_tokens: int) -> None:
    """Write a corpus as JSON lines.

    Args:
        name: `gsm` (worked problems, with their split), `python` (its standard library), `pydoc`
            (its reference documentation), `manpages` (English manual pages of this system) or
            `mixed` (documentation of installed packages: prose with code).
        path: file to write.
        num_tokens: approximate size, for a tokenizer of about 50,000 tokens.

    Raises:
        InputError: no corpus has this name, or this system has no manual pages.
        MissingExtraError: gsm, and reasoning-gym is not installed.
    """
    records: Iterable[dict[str, Any]]
    if name == GSM:
        records = iter(make_corpus(max(8, num_tokens // _GSM_TOKENS)))
    elif name in _DOCUMENTS:
        characters = int(num_tokens * _CHARACTERS_PER_TOKEN[name])
        documents = iter_documents(name, num_characters=characters)
        records = ({"id": document, "text": text} for document, text in documents)
    else:
        raise InputError(
            f"corpus {name!r}: expected {GSM}, {', '.join(_DOCUMENTS)}, or LABEL=PATH of your files"
        )
    write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def iter_documents(name: str, *, num_characters: int) -> Iterator[tuple[str, str]]:
    """Yield id and text of the documents of a corpus until they have `num_characters`."""
    left = num_characters
    for document, text in _DOCUMENTS[name]():
        if left <= 0:
            return
        if text.strip():
            yield document, text[:left]
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
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
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
            f"corpus {MANPAGES}: expected the program man and pages below {_MAN}, got none. "
            f"Fix: {PYDOC}"
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
    """Return a page as plain text without margin and headers; empty if it is a link."""
    command = ["man", "--nh", "--nj", "-E", "ascii", "-P", "cat", str(path)]
    environment = os.environ | {"MANWIDTH": "80", "LC_ALL": "C"}
    text = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    ).stdout
    lines = [re.sub(r"^ {7}", "", line.rstrip()) for line in text.strip().splitlines()[1:-1]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()[:_PAGE_CHARACTERS]


def read_documentation() -> Iterator[tuple[str, str]]:
    """Yield documentation with code of installed packages, in a seeded random order.

    A page is a text file, or the docstrings of a module.
    """
    root = Path(sysconfig.get_path("purelib"))
    paths = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(_DOCUMENTATION) and ".dist-info" not in folder
    )
    seen: Counter[str] = Counter()
    for index in np.random.default_rng(0).permutation(len(paths)).tolist():
        place = paths[index].relative_to(root)
        if seen[place.parts[0]] == _PAGES_A_PACKAGE:
            continue
        text = read_page(paths[index])[:_PAGE_CHARACTERS]  # code behind the cut does not count
        if len(text) >= _LEAST_CHARACTERS and any(mark in text for mark in _CODE):
            seen[place.parts[0]] += 1
            yield place.as_posix(), text


def read_page(path: Path) -> str:
    """Return the text of a file; of a module its docstrings, in order."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".py":
        return text
    if ">>> " not in text:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the page's own code
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):  # a template of a module
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
    return "\n\n".join(each for each in found if each)


_DOCUMENTS = {
    PYTHON: _read_standard_library,
    PYDOC: _read_reference,
    MANPAGES: _read_manual,
    MIXED: read_documentation,
}
