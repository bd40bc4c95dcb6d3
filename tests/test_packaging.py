"""setup.cfg, constraints.txt and the folders agree with each other."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("cache", "train", "tools")
NOT_INSTALLED = {
    "carryon.tools.bench",
    "carryon.tools.bench.accuracy",
    "carryon.tools.bench.exchange",
    "carryon.tools.bench.mixtures",
    "carryon.tools.bench.teacher",
    "carryon.tools.bench.trust",
}
"""Run from a checkout."""
TOP_FILES = {
    ".gitignore",
    ".ruff.toml",
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.cfg",
}
COMES_WITH_ANOTHER = {"huggingface_hub", "jinja2", "tokenizers"}
"""Imported, but not listed: transformers and torch bring them."""
OTHER_NAMES = {"yaml": "pyyaml"}
"""Modules that are not called like their distribution."""


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def requirement_names(text: str) -> set[str]:
    """Return the normalized distribution names of a requirement list."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {
        re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower()  # type: ignore[index]
        for line in lines
        if line
    }


def declared_names() -> set[str]:
    setup = read_setup()
    names = requirement_names(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        names |= requirement_names(extra)
    return names


def test_every_folder_with_code_is_listed_but_the_benchmarks() -> None:
    options = read_setup()["options"]
    with_code = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    names = {".".join(["carryon", *folder.relative_to(ROOT).parts]) for folder in with_code}
    assert options["packages"].split() == sorted(names - NOT_INSTALLED)
    mapped = dict(line.split(" = ") for line in options["package_dir"].strip().splitlines())
    assert mapped == {f"carryon.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_package_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    shipped = read_setup()["options.package_data"][f"carryon.{folder}"]
    assert shipped == ("py.typed, presets/*.yaml" if folder == "train" else "py.typed")


def test_every_direct_requirement_has_a_tested_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert declared_names() <= requirement_names(constraints)
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins), "exact versions only"
    assert pins == sorted(pins, key=str.lower)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_of_another_project_is_a_requirement(folder: str) -> None:
    allowed = {name.replace("-", "_") for name in declared_names()} | COMES_WITH_ANOTHER
    for path in (ROOT / folder).rglob("*.py"):
        foreign = top_level_imports(path) - sys.stdlib_module_names - {"carryon"}
        named = {OTHER_NAMES.get(name, name) for name in foreign}
        assert named <= allowed, f"{path.name} imports {sorted(named - allowed)}"


def test_the_test_extra_holds_what_the_demo_needs() -> None:
    extras = read_setup()["options.extras_require"]
    assert requirement_names(extras["demo"]) <= requirement_names(extras["test"])


def test_no_host_or_index_is_named() -> None:
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text), name


def test_no_other_file_is_kept_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = {name for name in listed.stdout.splitlines() if "/" not in name}
    assert files == TOP_FILES


def test_the_installed_command_is_carryon() -> None:
    scripts = importlib.metadata.distribution("gpt-carry-on").entry_points
    assert {(item.name, item.value) for item in scripts} == {
        ("carryon", "carryon.tools.cli.main:main")
    }


def test_source_is_ascii() -> None:
    for folder in (*FOLDERS, "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_bytes().isascii(), f"{folder}/{path.name}"


def top_level_imports(path: Path) -> set[str]:
    """Return the first part of every absolute import in the file, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names
