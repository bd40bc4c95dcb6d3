"""Where a lineage's texts are: files of any kind, found again by their content."""

import json
from pathlib import Path

import pytest
from support.tiny_runs import TINY, write_texts
from support.tiny_stores import READING

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import InputError
from carryon.cache.format.manifest import CorpusPart, read_manifest
from carryon.cache.format.zarr_metadata import SKIPPED_PATH
from carryon.train.continual.lineage import update
from carryon.train.continual.texts import find_texts, remember_texts


def part_of(*paths: Path) -> CorpusPart:
    """Return the part of a store that these files were extracted to."""
    sources = open_sources([str(path) for path in paths], READING, folder=cache_folder())
    return CorpusPart(
        fingerprint="0" * 64,
        files=[source.facts for source in sources],
        counts={},
        first_unit=0,
        num_units=1,
        first_sample=0,
        num_samples=1,
    )


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """A file that is read line by line, and one that becomes a table."""
    table = tmp_path / "texts.csv"
    table.write_text("text\non an ice\nis the thing\n")
    return [write_texts(tmp_path / "texts.jsonl"), table]


def test_files_and_tables_are_found_again(texts: list[Path], tmp_path: Path) -> None:
    remember_texts(tmp_path, [str(path) for path in texts], READING)
    assert find_texts(tmp_path, [part_of(*texts)], READING) == [str(path) for path in texts]


def test_files_of_a_folder_are_found_one_by_one(texts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    moved = [path.rename(folder / path.name) for path in texts]
    remember_texts(tmp_path, [str(folder)], READING)
    assert find_texts(tmp_path, [part_of(*moved)], READING) == [str(path) for path in moved]


@pytest.mark.parametrize("number", [0, 1])
def test_a_changed_or_missing_file_is_named(texts: list[Path], tmp_path: Path, number: int) -> None:
    remember_texts(tmp_path, [str(path) for path in texts], READING)
    part, lost = part_of(*texts), texts[number]
    lost.write_text(lost.read_text().replace("ice", "ace").replace("text-0", "text-x"))
    with pytest.raises(InputError, match=f"not found: {lost.name}. Fix: give them with --data"):
        find_texts(tmp_path, [part], READING)
    lost.unlink()
    with pytest.raises(InputError, match=f"not found: {lost.name}. Fix"):
        find_texts(tmp_path, [part], READING)


def test_an_update_reads_its_data_as_its_options_say(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    data = write_texts(tmp_path / "texts.jsonl")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    renamed = [{{"text": "body"}.get(key, key): row[key] for key in row} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in renamed) + "{no json\n")
    update(
        tmp_path / "lineage",
        data=data,
        base=tiny_base_folder,
        settings=TINY.with_options(min_lr_ratio=0.1),
        column=["text=body"],
        bad_rows="skip",
    )
    store = tmp_path / "lineage/store"
    assert len((store / SKIPPED_PATH).read_text().splitlines()) == 1
    assert read_manifest(store).num_samples == len(rows)
