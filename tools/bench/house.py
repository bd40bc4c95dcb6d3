"""The shape of the source, and how fast the command line and an import answer."""

import ast
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.compare.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cache", "train", "tools")
NOT_INSTALLED = ROOT / "tools/bench"
SMALL_STORES = ROOT / "tests/data/before.tar.xz"
_ROUNDS = 5


def measure_shape(job: Job) -> None:
    """Report modules, files, floors, imports and lines of the source."""
    for figure in _shape():
        job.add(figure)


def measure_start(job: Job) -> None:
    """Report the seconds of --help, and the large modules that opening a store loads."""
    for figure in (*_seconds_of_help(), _imports_of_opening()):
        job.add(figure)


def _shape() -> Iterator[Figure]:
    installed = [path for path in _sources() if NOT_INSTALLED not in path.parents]
    tops = {name: _num_modules(ROOT / name) for name in PACKAGES}
    yield _count("house.modules_at_the_top", max(tops.values()), 10, per_package=tops)
    folders = {str(path.relative_to(ROOT)) for path in {file.parent for file in installed}}
    files = {name: len(list((ROOT / name).glob("*.py"))) for name in folders}
    largest = max(files, key=lambda name: files[name])
    yield _count("house.files_in_a_folder", files[largest], 16, folder=largest)
    graph = _room_graph(installed)
    circles = sorted(room for room in graph if room in _reached(graph, room))
    rooms = [room for room in graph if room.startswith("train/") and (ROOT / room).is_dir()]
    floors = 0 if circles else 1 + max(_floor(graph, room, within="train/") for room in rooms)
    yield _count("house.floors_of_train", floors, 7)
    yield _count("house.circles", len(circles), 0, rooms=circles)
    upward = sorted(
        f"{room} -> {below}"
        for room in graph
        for below in graph[room]
        if PACKAGES.index(below.split("/")[0]) > PACKAGES.index(room.split("/")[0])
    )
    yield _count("house.upward_imports", len(upward), 0, imports=upward)
    yield _count("house.source_lines", sum(map(_num_lines, installed)), 18_000)
    yield _count("house.readme_lines", _num_lines(ROOT / "README.md"), 200)


def _seconds_of_help() -> Iterator[Figure]:
    for name, words in (("house.help", []), ("house.train_help", ["train"])):
        command = [sys.executable, "-m", "carryon.tools.cli.main", *words, "--help"]
        seconds = []
        for _ in range(_ROUNDS):
            started_at = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - started_at)
        yield Figure(figure=name, value=statistics.median(seconds), unit="s", target=0.5)


def _imports_of_opening() -> Figure:
    code = (
        "import sys\nfrom carryon.cache import Store\nStore.open('store').read_unit(0)\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(SMALL_STORES) as archive:
        safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # 3.11.4
        archive.extractall(scratch, **safe)
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, check=True, capture_output=True, cwd=scratch)
    names = result.stdout.decode().split()
    return _count("house.large_imports_of_opening_a_store", len(names), 0, names=names)


def _count(name: str, value: int, target: int, **details: Any) -> Figure:  # noqa: ANN401
    return Figure(figure=name, value=value, unit="", target=target, details=details)


@cache
def _sources() -> tuple[Path, ...]:
    return tuple(sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py")))


def _num_modules(package: Path) -> int:
    return len([path for path in package.glob("*.py") if path.name != "__init__.py"])


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _room_graph(sources: list[Path]) -> dict[str, set[str]]:
    """Return room -> rooms that it imports; a room is a folder, or a file at a package's top."""
    graph: dict[str, set[str]] = {}
    for path in sources:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) == 2 and parts[1] == "__init__":
            continue  # the public names, from every room of the package
        room = "/".join(parts[:2])
        below = graph.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carryon."):
                names = (node.module or "").split(".")[1:]
                names += [node.names[0].name] if len(names) == 1 else []
                below.add("/".join(names[:2]))
        below.discard(room)
    return graph


def _reached(graph: Mapping[str, set[str]], room: str) -> set[str]:
    reached: set[str] = set()
    pending = list(graph[room])
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += graph.get(name, ())
    return reached


def _floor(graph: Mapping[str, set[str]], room: str, *, within: str) -> int:
    below = [name for name in graph.get(room, ()) if name.startswith(within)]
    return max((1 + _floor(graph, name, within=within) for name in below), default=0)
