"""Which file may import what, read from the source, and what an import really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE_ROOT = {
    "cache/errors": set(),
    "cache/progress": set(),
    "cache/time_limit": set(),
    "cache/versions": set(),
    "cache/files": {"cache/errors"},
    "cache/checked_settings": {"cache/errors"},
    "cache/settings": {"cache/errors", "cache/checked_settings"},
    "cache/optional": {"cache/errors"},
    "cache/timing": set(),
    "cache/device": {"cache/errors", "cache/timing"},
    "cache/lock": {"cache/errors", "cache/files"},
}
FLOORS = [
    {"cache/base", "cache/corpus"},
    {"cache/format", "cache/alignment"},
    {"cache/store"},
    {"cache/extraction"},
    {"cache/exchange"},
    {"train/kinds", "train/plots", "train/saved_settings", "train/compile_settings"},
    {"train/config"},
    {"train/settings_file"},
    {"train/modules"},
    {"train/data", "train/optim"},
    {"train/losses"},
    {"train/mixing"},
    {"train/trainer"},
    {"train/inference", "train/continual"},
    {"train/cross_checks"},
    {"train/verify"},
    {"tools/cli"},
    {"tools/demo", "tools/improve"},
    {"tools/compare"},
    {"tools/commands"},
    {"tools/bench"},
]
"""From the ground up, on top of CACHE_ROOT: a room may import what stands on a lower floor."""
MOST_AT_THE_TOP, MOST_IN_A_FOLDER = 10, 16
PACKAGES = ("cache", "train", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def room_of(path: Path) -> str:
    """Return the room of a source file: its folder, or itself at the top of a package.

    Example: `cache/store/reader.py` is in `cache/store`, `cache/lock.py` is `cache/lock`.
    """
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "/".join(parts[:2])


def rooms_below(room: str) -> set[str]:
    """Return what the files of a room may import beside each other."""
    if room in CACHE_ROOT:
        return set(CACHE_ROOT[room])
    number = next(number for number, floor in enumerate(FLOORS) if room in floor)
    return set(CACHE_ROOT).union(*FLOORS[:number])


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms that a file imports anywhere in it."""
    rooms = set()
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "carryon" and len(parts) > 2:
            rooms.add("/".join(parts[1:3]))
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_stands_below_it(path: Path) -> None:
    room = room_of(path)
    if path.name == "__init__.py" and path.parent.name in PACKAGES:
        return  # the public names, from every room of the package
    unknown = {name for name in rooms_imported(path) if not is_room(name)}
    assert not unknown, f"{path.name} imports {sorted(unknown)}, which no floor lists"
    above = rooms_imported(path) - rooms_below(room) - {room}
    assert not above, f"{room} may not import {sorted(above)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_come_from_the_own_package(package: str) -> None:
    rooms = rooms_imported(ROOT / package / "__init__.py")
    assert {name.split("/")[0] for name in rooms} <= {package}


def is_room(name: str) -> bool:
    """Return whether a floor lists the room."""
    return name in CACHE_ROOT or any(name in floor for floor in FLOORS)


def test_every_source_file_stands_on_a_floor() -> None:
    rooms = {room_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert {name for name in rooms if not is_room(name)} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_small_enough_to_look_through(package: str) -> None:
    top = [path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
    assert len(top) <= MOST_AT_THE_TOP
    for folder in {path.parent for path in SOURCES} - {ROOT / "tools/bench"}:
        assert len(list(folder.glob("*.py"))) <= MOST_IN_A_FOLDER, folder


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "__init__.py"], ids=room_of
)
def test_every_folder_says_what_lives_there(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(text.splitlines()) >= 2, "two or three lines: what lives here, and what does not"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_packages_are_imported_as_carryon_only(path: Path) -> None:
    bare = {name for name in imported_names(path) if name.split(".")[0] in PACKAGES}
    assert not bare, f"write carryon.{min(bare, default='')}"


def test_no_package_has_the_name_of_a_standard_module() -> None:
    names = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert names.isdisjoint(sys.stdlib_module_names)


def test_opening_a_store_loads_neither_torch_nor_transformers() -> None:
    assert loaded_by("import carryon.cache.store.reader").isdisjoint({"torch", "transformers"})


def test_what_measures_the_memory_of_training_does_not_load_transformers() -> None:
    loaded = loaded_by("import carryon.tools.bench.memory")
    assert "transformers" not in loaded, "150 MB would be counted as those of a run"


@pytest.mark.parametrize("module", ["carryon.cache.settings", "carryon.train.config"])
def test_settings_load_nothing_large(module: str) -> None:
    large = {"torch", "transformers", "zarr", "numpy"}
    assert loaded_by(f"import {module}").isdisjoint(large)


def test_the_trainer_loads_no_base() -> None:
    loaded = loaded_by("import carryon.train.trainer.trainer")
    assert loaded.isdisjoint({"carryon.cache.base.model", "carryon.cache.base.hooks"})


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
