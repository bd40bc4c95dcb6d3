"""What a file holds, by its suffix or its first bytes."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from carryon.cache.corpus.reading.json_rows import BYTE_ORDER_MARK, MAX_RECORD_BYTES, parse_line
from carryon.cache.corpus.reading.packing import MAGIC, open_file, packing_of_magic
from carryon.cache.errors import InputError

Kind = Literal["json lines", "json array", "text", "csv", "tsv", "parquet", "arrow"]

_DATA: dict[str, Kind | Literal["json"]] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_TEXT_WORDS = (
    "txt text md markdown mdx rst adoc asciidoc org tex bib log html htm xml xhtml svg srt "
    "vtt po yaml yml toml ini cfg conf env properties diff patch py pyi pyx ipynb c h cc cpp "
    "cxx hh hpp hxx cu cuh m mm java kt kts scala groovy gradle clj js jsx mjs cjs ts tsx vue "
    "svelte css scss sass less php rb erb go rs swift dart cs fs fsx vb hs ml mli elm ex exs "
    "erl hrl lua pl pm r rmd jl f for f90 f95 pas ada adb ads lisp el scm rkt tcl sql sh bash "
    "zsh fish ps1 bat cmd awk sed asm s v sv vhd vhdl proto thrift graphql cmake mk nix tf "
    "hcl zig nim d sol wat lean coq agda tla"
)
_TEXTS = frozenset(f".{word}" for word in _TEXT_WORDS.split())
NOT_DATA = frozenset(
    {
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "config.json",
    }
)
"""Names of files that describe the data in a folder."""
_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class FileKind:
    """Form and compression of a file."""

    kind: Kind
    packing: str
    """Suffix of its compression, such as `.gz`; empty for none."""

    @property
    def is_text(self) -> bool:
        """Return whether the whole file is one document."""
        return self.kind == "text"


def kind_by_name(path: Path) -> FileKind | None:
    """Return the kind that the suffix stands for; of `.json` by a look inside. None: unknown.

    Raises:
        InputError: a `.json` file cannot be read.
    """
    suffix, packing = _suffixes(path)
    if suffix in _TEXTS:
        return FileKind("text", packing)
    kind = _DATA.get(suffix)
    if kind == "json":
        return FileKind(_json_kind(_first_line(path, packing)), packing)
    return FileKind(kind, packing) if kind else None


def has_known_suffix(name: str) -> bool:
    """Return whether `name` ends as a file of a known kind does, compressed or not."""
    suffix, packing = _suffixes(Path(name))
    return suffix in _DATA or suffix in _TEXTS or bool(packing)


def kind_by_content(path: Path) -> FileKind | None:
    """Return the kind that the first bytes tell: a table, JSON lines or an array. None: unknown.

    Raises:
        InputError: the file cannot be read.
    """
    with open_file(path, "", name=str(path)) as (stream, _):
        packing = packing_of_magic(stream.read(8))
    with open_file(path, packing, name=str(path)) as (stream, _):
        head = stream.read(8)
    if head.startswith(b"PAR1"):
        return FileKind("parquet", packing)
    if head.startswith(b"ARROW1"):
        return FileKind("arrow", packing)
    if head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] not in (b"[", b"{"):
        return None
    line = _first_line(path, packing)
    kind = _json_kind(line)
    if kind == "json lines":
        try:
            parse_line(line)
        except ValueError:
            return None
    elif line[:1] == b"[" and line[1:].lstrip()[:1] not in (b"{", b""):
        return None
    return FileKind(kind, packing)


def is_utf8(path: Path) -> bool:
    """Return whether the beginning of a file is UTF-8 text without NUL.

    Raises:
        InputError: the file cannot be read.
    """
    with open_file(path, "", name=str(path)) as (stream, _):
        head = stream.read(_HEAD_BYTES)
        is_whole = not stream.read(1)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if is_whole or error.start < len(head) - 4:  # else a character is cut off
            return False
    return b"\0" not in head


def refuse_unknown(path: Path) -> InputError:
    """Return the error for a file given by itself that is of no known kind."""
    if not is_utf8(path):
        return InputError(
            f"{path}: expected JSON lines, a table or UTF-8 text, got binary. "
            "Fix: convert or unpack it first"
        )
    suffix = path.suffix or "none"
    return InputError(
        f"{path}: expected a suffix that says what it holds, got {suffix}. "
        "Fix: rename it to .txt if it is one text, or to .jsonl if it holds JSON lines"
    )


def stem_of(name: str) -> str:
    """Return the last part of a name without the suffixes of kind and compression."""
    path = Path(name)
    _, packing = _suffixes(path)
    return Path(path.stem).stem if packing else path.stem


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that says the kind, and the one that says the compression."""
    packing = path.suffix.lower()
    if packing not in MAGIC:
        return packing, ""
    return Path(path.stem).suffix.lower(), packing


def _first_line(path: Path, packing: str) -> bytes:
    """Return the first line that is not blank, without white space at its ends."""
    with open_file(path, packing, name=str(path)) as (stream, _):
        for line in iter(partial(stream.readline, MAX_RECORD_BYTES), b""):
            line = line.removeprefix(BYTE_ORDER_MARK).strip()
            if line:
                return line
    return b""


def _json_kind(line: bytes) -> Literal["json lines", "json array"]:
    """Tell JSON lines from an array or pretty-printed objects by the first line."""
    if line[:1] != b"{":
        return "json array" if line[:1] == b"[" else "json lines"
    text = line.decode(errors="replace")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # A line that breaks off at its end, such as {"messages": [, is of a pretty-printed object.
        return "json array" if error.pos >= len(text) - 1 else "json lines"
    except (ValueError, RecursionError):
        pass
    return "json lines"
