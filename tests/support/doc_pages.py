"""The pages of the documentation, and their blocks run as a reader would run them.

A page is run from its first block to its last in one folder, which holds the files that the
pages speak of: a tiny base under the hub id that the text names, and some small corpora. So the
text stays what a reader types. Three HTML comments steer a run and are invisible on the page:

    <!-- not run: REASON -->    before a block that is only shown
    <!-- file: NAME -->         before a block that is written to a file of that name
    <!-- setup: COMMAND -->     a command that the page takes as done
"""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.tools.cli.main import main
from support.tiny_bases import make_tiny_base

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub id in the text; in a page's folder it is the relative path of the tiny base."""
RUN = ("sh", "python")
"""Languages of the blocks that are run."""
SHOWN = ("text", "yaml", "json")
"""Languages of the blocks that are only shown, or written to a file."""

_PART = re.compile(
    r"^<!-- (?P<order>not run|file|setup): (?P<value>[^\n]*?) -->$"
    r"|^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block of a page, or one command of its setup."""

    language: str
    code: str
    line: int
    reason: str = ""
    """Why it is not run; empty where it is."""
    file: str = ""
    """File that it is written to; empty for none."""


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order, each with what the comment before it says."""
    text = page.read_text(encoding="utf-8")
    orders: dict[str, str] = {}
    last = 0
    for part in _PART.finditer(text):
        if text[last : part.start()].strip():
            assert not orders, f"{page.name}: a comment without its block: {orders}"
        last, line = part.end(), text.count("\n", 0, part.start()) + 1
        if part["order"] == "setup":
            yield Block(language="sh", code=part["value"], line=line)
        elif part["order"]:
            orders[part["order"]] = part["value"]
        else:
            yield Block(
                language=part["language"],
                code=part["code"],
                line=line,
                reason=orders.pop("not run", ""),
                file=orders.pop("file", ""),
            )


def run_page(page: Path) -> int:
    """Run the blocks of a page in the current folder; return how many were run."""
    names: dict[str, Any] = {"__name__": page.stem}
    num_run = 0
    for block in blocks_of(page):
        if block.file:
            Path(block.file).write_text(block.code, encoding="utf-8")
        if block.reason or block.language not in RUN:
            continue
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile(block.code, where, "exec"), names)
        else:
            for command in commands_of(block.code):
                run_command(command, where)
        num_run += 1
    return num_run


def commands_of(code: str) -> Iterator[str]:
    """Yield the commands of a shell block, continued lines joined, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def run_command(command: str, where: str) -> None:
    """Run one line of shell; `carryon` without redirections runs in this process."""
    words = shlex.split(command, comments=True)
    if words[0] == "carryon" and not {">", "|", "&&", ";"} & set(words):
        assert main(words[1:]) == 0, f"{where}: {command}"
    else:
        subprocess.run(["bash", "-ec", command], check=True)


def make_page_folder(folder: Path, base: Path) -> Path:
    """Fill a folder with the base, under its hub id, and the corpora of the pages."""
    place = folder / BASE_ID
    place.parent.mkdir(parents=True)
    place.symlink_to(base)
    for name, first in (("chats", 0), ("march", 100), ("april", 200)):
        records = map(_chat, range(first, first + 24))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def make_page_base(folder: Path) -> Path:
    """Save a tiny base of as many blocks as the one whose hub id the pages name."""
    return make_tiny_base(folder, context=1024, num_hidden_layers=30, max_position_embeddings=1024)


def _chat(number: int) -> dict[str, Any]:
    question = f"What is the sum of {number} and {number + 3}?"
    answer = f"{number} and {number + 3} make {2 * number + 3} in all."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "split": "train" if number % 6 else "held-out"}


def options_of_page(text: str) -> set[str]:
    """Return all options that a text names, such as --out."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
