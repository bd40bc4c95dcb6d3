"""Wrong files of hidden states are refused, each by name; right ones are not."""

from pathlib import Path

import datasets
import pyarrow
import pytest

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.cache.exchange.saved_rows import read_rows
from carryon.tools.bench.exchange.guards import WRONG, Wrong, try_import


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_name(tiny_base: Base, store_tmp: Path, name: str) -> None:
    wrong = WRONG[name]
    error, path = try_import(store_tmp, tiny_base, wrong)
    assert wrong.says in error
    assert "\n" not in error
    assert "Fix: " in error
    assert not wrong.names_file or path in error


@pytest.mark.parametrize("is_data_set", [False, True])
def test_right_files_are_taken(tiny_base: Base, store_tmp: Path, is_data_set: bool) -> None:
    right = Wrong(says="", is_data_set=is_data_set)
    assert try_import(store_tmp, tiny_base, right)[0] == ""


NAMES = ("input_ids", "loss_mask", "input_ids")
EXPORTED = {
    "id": ["a"],
    "char_end": [[1, 2, 3]],
    "is_held_out": [False],
    "group": [1],
    "role": [0],
}


@pytest.mark.parametrize("name", ["", "a\0", "x" * 256])
def test_ids_that_no_store_can_hold_are_refused(tmp_path: Path, name: str) -> None:
    rows = {"input_ids": [[1, 2, 3]], "loss_mask": [[1, 1, 1]], **EXPORTED, "id": [name]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(InputError, match="row 0: id: expected"):
        list(read_rows(tmp_path / "data"))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(str(tmp_path))
    [path] = tmp_path.glob("*.arrow")
    schema = pyarrow.schema([(name, pyarrow.list_(pyarrow.int64())) for name in NAMES])
    cells = [pyarrow.array([[1]], pyarrow.list_(pyarrow.int64()))] * len(NAMES)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pyarrow.record_batch(cells, schema=schema))
    with pytest.raises(InputError, match="input_ids and loss_mask, one each"):
        list(read_rows(tmp_path))
