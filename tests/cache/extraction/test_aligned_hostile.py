"""A stranger's aligned store, every digest valid: one line for each thing that is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.aligned_stores import FORWARD, ROWS, SETTINGS, align, make_base, write
from support.tiny_stores import small_pieces

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import DamagedStoreError, SettingMismatchError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.repair import repair
from carryon.cache.format.alignment import read_alignment, read_num_nodes
from carryon.cache.format.arrays import array_info, read_array
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.verify import verify
from carryon.tools.bench.trust.signing import replace_planned, sign_manifest
from carryon.tools.cli.main import main

Values = NDArray[Any]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A base, and a folder with `anchor` and the store `aligned` of the base."""
    folder = tmp_path_factory.mktemp("given")
    with small_pieces():
        extract(
            base=str(make_base(folder / "base", "gpt2", max_position_embeddings=512)),
            data=write(ROWS, folder / "data"),
            out=folder / "anchor",
            store=SETTINGS,
            forward=FORWARD,
        )
    path = make_base(folder / "other", "qwen", vocab=420, max_position_embeddings=512)
    base = load_base(str(path), forward=FORWARD)
    align(base, folder / "anchor", folder / "aligned")
    return base, folder


def put(at: Any, value: Any) -> Callable[[Values], Values]:  # noqa: ANN401
    """Return a change of one element."""

    def change(values: Values) -> Values:
        values[at] = value
        return values

    return change


def second_tree(root: Path) -> int:
    """Return the first node of the second tree of unit 0."""
    return int(read_num_nodes(root, read_manifest(root))[0])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("parents", put((0, 5), 9)),
        ("parents", put((0, 5), 5)),
        ("parents", put((0, 5), -3)),
        ("parents", put((0, 5), -2)),
        ("tokens", put((0, 5), 1 << 30)),
        ("tokens", put((0, 5), -1)),
        ("exact", put(3, 1 << 30)),
        ("exact", put(3, -2)),
        ("stable", put(3, 1 << 30)),
        ("covered", put(3, -1)),
        ("is_whole", put(3, 2)),
        ("num_nodes", put(0, 1)),
        ("num_nodes", put(0, -1)),
        ("num_nodes", put(0, (1 << 31) - 1)),
    ],
)
def test_numbers_that_point_nowhere_are_named(
    given: tuple[Base, Path], tmp_path: Path, name: str, change: Callable[[Values], Values]
) -> None:
    base, folder = given
    root = tmp_path / "store"
    shutil.copytree(folder / "aligned", root)
    digests = read_manifest(root).files
    info = array_info(root, f"aligned/{name}", digests=digests)
    stop = min(info.chunk[0], info.shape[0])
    chunk = np.zeros(info.chunk, dtype=info.dtype)
    chunk[:stop] = read_array(root, f"aligned/{name}", stop=stop, digests=digests)
    path = f"aligned/{name}/c/0" + "/0" * (chunk.ndim - 1)
    replace_planned(root, path, encode_chunk(change(chunk)))
    assert_named(root, base)


def test_paths_that_leave_a_tree_are_named(given: tuple[Base, Path], tmp_path: Path) -> None:
    base, folder = given
    for name in ("parents", "exact", "stable"):
        root = tmp_path / name
        shutil.copytree(folder / "aligned", root)
        manifest, first = read_manifest(root), second_tree(root)
        values = getattr(read_alignment(root, manifest, 0), name)
        if name == "parents":
            whole = read_array(root, "aligned/parents", stop=1, digests=manifest.files)
            whole[0, first + 1] = first - 1
            replace_planned(root, "aligned/parents/c/0/0", encode_chunk(whole))
        else:
            values[0] = first
            replace_planned(root, f"aligned/{name}/c/0", encode_chunk(values))
        assert_named(root, base)


def assert_named(root: Path, base: Base) -> None:
    """Check that one problem is reported, and that nothing is computed from it."""
    report = verify(root, depth="full")
    assert len(report.problems) >= 1
    assert all(": aligned: " in problem.text for problem in report.problems), report.problems
    with small_pieces(), pytest.raises(DamagedStoreError, match="aligned: .*extract into another"):
        repair(root, base=base, forward=FORWARD)
    assert main(["verify", "store", str(root), "--full"]) != 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchor", 3),
        ("anchor", None),
        ("anchor_base", ["x"]),
        ("anchor_vocab_size", "12"),
        ("anchor_vocab_size", 1 << 40),
        ("unit_nodes", True),
        ("missing_samples", -1),
        ("rules", "2"),
        ("rules", 0),
        ("digest", {}),
    ],
)
def test_facts_of_an_alignment_are_checked(
    given: tuple[Base, Path], tmp_path: Path, name: str, value: object
) -> None:
    root = tmp_path / "store"
    shutil.copytree(given[1] / "aligned", root)
    sign_manifest(root, lambda values: values["alignment"].update({name: value}))
    with pytest.raises(DamagedStoreError, match=name):
        read_manifest(root)
    assert main(["inspect", "store", str(root)]) == 2


def test_an_anchor_that_names_no_tokenizer_is_refused(
    given: tuple[Base, Path], tmp_path: Path
) -> None:
    base, folder = given
    shutil.copytree(folder / "anchor", tmp_path / "anchor")
    sign_manifest(tmp_path / "anchor", lambda values: values["base"].pop("tokenizer_sha256"))
    with pytest.raises(SettingMismatchError, match="recorded tokenizer"):
        align(base, tmp_path / "anchor", tmp_path / "b")
