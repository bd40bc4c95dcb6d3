"""Which file may import what, read from the source, and what an import really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "cache": {"cache"},
    "train": {"cache", "train"},
    "tools": {"cache", "train", "tools"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_of_our_own_packages_follow_the_arrow(path: Path) -> None:
    allowed = MAY_IMPORT[path.parent.name]
    own = {name.split(".")[1] for name in imported_names(path) if name.startswith("carryon.")}
    assert own <= allowed, f"{path.name} may import {sorted(allowed)}, imports {sorted(own)}"


@pytest.mark.parametrize(
    "path", SOURCES + TESTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_our_packages_are_imported_as_carryon_only(path: Path) -> None:
    bare = {name for name in imported_names(path) if name.split(".")[0] in MAY_IMPORT}
    assert not bare, f"write carryon.{min(bare, default='')}"


def test_no_program_has_the_name_of_a_standard_module() -> None:
    names = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert names.isdisjoint(sys.stdlib_module_names)


def test_opening_a_store_loads_neither_torch_nor_transformers() -> None:
    assert loaded_by("import carryon.cache.reader").isdisjoint({"torch", "transformers"})


@pytest.mark.parametrize("module", ["carryon.cache.spec", "carryon.train.config"])
def test_settings_load_nothing_large(module: str) -> None:
    large = {"torch", "transformers", "zarr", "numpy"}
    assert loaded_by(f"import {module}").isdisjoint(large)


def test_the_trainer_loads_no_base() -> None:
    loaded = loaded_by("import carryon.train.loop")
    assert loaded.isdisjoint({"carryon.cache.base", "carryon.cache.capture"})


def test_the_name_finder_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import a.b\nfrom c import d\ndef f():\n    from . import e\n    import g as h\n"
    )
    assert imported_names(path) == {"a.b", "c", "c.d", ".", "..e", "g"}


def imported_names(path: Path) -> set[str]:
    """Return the dotted names that the file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def loaded_by(statement: str) -> set[str]:
    """Return the modules that are loaded after `statement` in a fresh process."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())
