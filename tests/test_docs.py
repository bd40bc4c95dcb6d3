"""What the README says is there, is there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from carryon.tools.cli.main import main
from carryon.tools.cli.options import options_of
from carryon.tools.cli.subcommands import CARRYON

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("cache", "train", "tools")
EVERYWHERE = {"--help", "--config", "--print-config"}


def section(title: str) -> str:
    """Return the text between the heading `title` and the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def code_blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language; of none for the empty name."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.M)
    assert README.isascii()


def test_the_file_tree_names_every_source_file_with_a_phrase() -> None:
    listed: dict[str, set[str]] = {}
    folder = ""
    for line in section("Files").splitlines():
        if header := re.match(r"\W*(\w+)/", line):
            folder = header[1]
        for name in re.findall(r"\b(\w+\.py)\b`?[ |]+\S", line):
            listed.setdefault(folder, set()).add(name)
    for name in FOLDERS:
        files = {path.name for path in (ROOT / name).glob("*.py")} - {"__init__.py"}
        assert listed.get(name) == files


def test_the_table_of_programs_is_the_list_of_subcommands() -> None:
    listed = re.findall(r"^\| `carryon ([\w -]+)` \| \S", README, re.M)
    assert sorted(listed) == sorted(CARRYON.commands)


def test_every_command_line_uses_options_that_exist() -> None:
    known = {
        name: {item.flag for item in options_of(CARRYON.find(name))} for name in CARRYON.commands
    }
    for line in re.findall(r"carryon ([a-z]+(?: +(?!&&|\|)[^\s`]+)*)", README):
        name, *rest = line.split()
        if name in CARRYON.commands:
            used = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert used <= known[name] | EVERYWHERE, f"carryon {name}"


def test_every_option_in_the_text_exists_somewhere() -> None:
    known = set().union(
        *({item.flag for item in options_of(CARRYON.find(name))} for name in CARRYON.commands)
    )
    tests_own = set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests/conftest.py").read_text()))
    used = set(re.findall(r"`(--[a-z][\w-]*)", README))
    assert used <= known | EVERYWHERE | tests_own


def test_the_two_commands_name_extras_that_exist() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    blocks = "".join(code_blocks(""))
    for command in ('pip install -c constraints.txt -e ".[demo]" && carryon demo', '".[test]"'):
        assert command in blocks
    for extra in re.findall(r"\.\[(\w+)\]", README):
        assert re.search(rf"^{extra} =$", setup, re.M), extra


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_python_examples_run(tiny_base_folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"train-{i}", "text": "the thing " * 10}) for i in range(10)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    argv = ["extract", "--base", str(tiny_base_folder), "--data", str(tmp_path / "corpus.jsonl")]
    argv += ["--out", str(tmp_path / "store"), "--unit-tokens", "64", "--device", "cpu"]
    assert main(argv) == 0
    program = "\n".join(code_blocks("python"))
    assert program
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name", sorted(CARRYON.commands))
def test_every_program_is_explained(name: str) -> None:
    assert f"`carryon {name}" in README
