"""Hostile documents and links in a lineage: one line, and nothing is written outside of it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_runs import TINY, folder_bytes, without_plots, write_texts

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.files.documents import json_bytes, sealed
from carryon.cache.format.manifest import read_manifest
from carryon.cache.settings import DataSettings
from carryon.tools.cli.main import main
from carryon.train.continual.lineage import update
from carryon.train.continual.lineage_dir import open_lineage
from carryon.train.continual.texts import find_texts
from carryon.train.continual.versions import list_versions

SETTINGS = TINY.with_options(min_lr_ratio=0.1)
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 10**9, 10**30])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../store#1", "/dev/zero#1", "store#0", "./../x", "a\0#1", "f" * 64, "#1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than tiny runs."""
    with without_plots():
        yield


@pytest.fixture(scope="module")
def grown(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lineage after one update, and a canary."""
    root = tmp_path_factory.mktemp("grown")
    (root / "canary").write_text("as it was")
    data = write_texts(root / "texts.jsonl")
    update(root / "lineage", data=data, base=tiny_base_folder, settings=SETTINGS)
    list_versions(root / "lineage", device="cpu")
    return root


@pytest.fixture
def copy(grown: Path, tmp_path: Path) -> Path:
    """The lineage, to be changed."""
    return Path(shutil.copytree(grown / "lineage", tmp_path / "lineage"))


def _spoil(document: Any, draw: st.DrawFn) -> Any:  # noqa: ANN401
    """Return a document with junk at a place that is drawn, or without what was there."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 3)) == 0:
        return draw(JUNK)
    document = deepcopy(document)
    keys = sorted(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    action = draw(st.integers(0, 7))
    if action == 0:
        del document[key]
    elif action == 1 and isinstance(document, dict):
        document[draw(st.text(max_size=8))] = draw(JUNK)
    else:
        document[key] = _spoil(document[key], draw)
    return document


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(["lineage.json", "texts.json", "versions.json"]))
def test_any_document_is_read_or_refused_with_one_line(
    data: st.DataObject, name: str, grown: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(grown / "lineage", Path(folder) / "lineage"))
        shutil.copy(grown / "canary", folder)
        document = json.loads((root / name).read_text())
        del document["sha256"]
        spoiled = _spoil(document, data.draw)
        is_signed = isinstance(spoiled, dict) and data.draw(st.booleans())
        content = json_bytes(sealed(spoiled)) if is_signed else json.dumps(spoiled).encode()
        (root / name).write_bytes(content)
        for use in (
            lambda: list_versions(root, device="cpu"),
            lambda: update(root, store=root / "store"),
            lambda: find_texts(root, read_manifest(root / "store").parts, DataSettings()),
        ):
            problem = "none"
            try:
                use()
            except CarryOnError as error:
                problem = str(error)
            assert len(problem.splitlines()) == 1, problem
        assert sorted(os.listdir(folder)) == ["canary", "lineage"]
        assert (Path(folder) / "canary").read_text() == "as it was"


@pytest.mark.parametrize("name", ["lineage.json", "texts.json"])
@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("is_signed", [False, True])
def test_deeply_nested_json_is_one_line(
    name: str, depth: int, is_signed: bool, copy: Path, tiny_base_folder: Path
) -> None:
    digest = f', "sha256": "{"0" * 64}"' if is_signed else ""
    (copy / name).write_text('{"a": ' + "[" * depth + "]" * depth + digest + "}")

    data = write_texts(copy.parent / "texts.jsonl")
    with pytest.raises(InputError) as raised:
        update(copy, data=data, base=tiny_base_folder)

    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith(f"{copy / name}: ")


@pytest.mark.parametrize(
    "name", ["lineage.json", "config.yaml", "texts.json", "versions.json", "versions.png"]
)
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_or_link_where_a_file_is_expected_is_one_line(
    name: str, kind: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = copy.parent / "precious"
    target.write_text("as it was")
    (copy / name).unlink(missing_ok=True)
    if kind == "folder":
        (copy / name).mkdir()
    else:
        (copy / name).symlink_to(target)
    before = folder_bytes(copy)

    for argv in (["update", "--store", str(copy / "store")], ["versions"]):
        assert main([argv[0], "--lineage", str(copy), *argv[1:]]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert f"{copy / name}: expected a file, got a {kind}" in shown[-1]

    assert target.read_text() == "as it was"
    assert folder_bytes(copy) == before


@pytest.mark.parametrize("name", ["trunk", "versions", "versions/0001", "start", "store"])
def test_a_folder_of_a_lineage_that_is_a_link_is_not_followed(
    name: str, copy: Path, tiny_base_folder: Path
) -> None:
    target = copy.parent / "elsewhere"
    if (copy / name).exists():
        (copy / name).rename(target)
    else:
        target.mkdir()
    (copy / name).symlink_to(target)
    before = folder_bytes(copy.parent)

    data = write_texts(copy.parent.parent / f"{copy.parent.name}.jsonl")
    with pytest.raises(InputError, match=f"{name}: expected a folder, got a link. Fix"):
        update(copy, data=data, base=tiny_base_folder)

    assert folder_bytes(copy.parent) == before


@pytest.mark.parametrize("store", ["../other#1", "store/../../x#1", "store", "/x", "./store#1"])
def test_a_store_outside_its_relative_place_is_refused(store: str, copy: Path) -> None:
    document = json.loads((copy / "lineage.json").read_text())
    del document["sha256"]
    document["increments"][0]["stores"] = [store]
    (copy / "lineage.json").write_bytes(json_bytes(sealed(document)))

    with pytest.raises(InputError, match="stores: expected STORE#NUMBER, got '"):
        open_lineage(copy)


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0}])
def test_settings_without_a_rate_are_refused(settings: dict[str, float], copy: Path) -> None:
    document = json.loads((copy / "lineage.json").read_text())
    document["settings"] = document["settings"] | settings if settings else {}
    del document["sha256"]
    (copy / "lineage.json").write_bytes(json_bytes(sealed(document)))
    with pytest.raises(InputError, match="settings: learning_rate: expected more than 0"):
        update(copy, store=copy / "store")


def test_one_changed_byte_of_a_lineage_is_noticed(copy: Path) -> None:
    path = copy / "lineage.json"
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"lineage.json: .* Fix: "):
            open_lineage(copy)


def test_damaged_losses_are_measured_again(copy: Path) -> None:
    before = list_versions(copy, device="cpu")
    path = copy / "versions.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"loss": ', b'"loss": 1'))

    assert list_versions(copy, device="cpu") == before
    assert path.read_bytes() == content


def test_a_damaged_report_is_made_again(copy: Path) -> None:
    path = copy / "versions/0001/result.json"
    content = json.loads(path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b'"num_steps": ', b'"num_steps": 1'))

    report = update(copy, store=copy / "store", device="cpu")

    assert report.carryon_nll == content["carryon_nll"]
