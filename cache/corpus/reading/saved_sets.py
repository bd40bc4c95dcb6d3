"""Folders that `save_to_disk` of `datasets` wrote: which Arrow files and splits they hold."""

import os
from pathlib import Path
from typing import Literal

from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_object


def saved_kind(folder: Path) -> Literal["splits", "table", ""]:
    """Return what was saved to a folder: splits (a DatasetDict), one table, or nothing."""
    if (folder / "dataset_dict.json").is_file():
        is_saved = any((folder / name / "state.json").is_file() for name in os.listdir(folder))
        return "splits" if is_saved else ""
    is_saved = (folder / "state.json").is_file() and any(folder.glob("*.arrow"))
    return "table" if is_saved else ""


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set that `Dataset.save_to_disk` wrote to `folder`.

    Raises:
        InputError: its state.json does not list them.
    """
    try:
        state = read_object((folder / "state.json").resolve())
        names = [item["filename"] for item in state["_data_files"]]
        files = [folder / name for name in names]
        if any(Path(name).name != name for name in names) or not files:
            raise ValueError("it names no files in this folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: expected a saved data set, got a damaged state.json ({error}). "
            "Fix: save it again with save_to_disk"
        ) from error
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder}: expected the file {file.name} of a saved data set, got none"
            )
    return files


def saved_splits(folder: Path) -> list[str]:
    """Return the splits of a data set that `DatasetDict.save_to_disk` wrote to `folder`.

    Raises:
        InputError: its dataset_dict.json does not list them.
    """
    try:
        splits = read_object((folder / "dataset_dict.json").resolve())["splits"]
        if not isinstance(splits, list) or any(Path(name).name != name for name in splits):
            raise ValueError("it names no splits")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: expected a saved data set, got a damaged dataset_dict.json ({error}). "
            "Fix: save it again with save_to_disk"
        ) from error
    return splits
