"""Folders as files and saved data sets, each with the split that its name tells."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from carryon.cache.corpus.reading.file_kinds import NOT_DATA, FileKind, is_utf8, kind_by_name
from carryon.cache.corpus.reading.saved_sets import saved_kind, saved_splits
from carryon.cache.corpus.reading.split_names import (
    is_evaluation,
    no_split,
    split_of_file,
    usual_split,
)
from carryon.cache.errors import InputError

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a folder with a saved data set."""

    path: Path
    kind: FileKind | None
    """None: a saved data set."""
    is_held_out: bool


def list_parts(folder: Path, split: str) -> list[Part]:
    """Return the data in a folder, sorted by path, at any depth; what is left out is logged.

    Args:
        folder: a data set saved by `datasets`, files as on the hub, other data files, or texts.
        split: the only one to take; empty for all.

    Raises:
        InputError: nothing to read, no such split, or splits that are neither for training nor for
            evaluation by their names.
    """
    if saved_kind(folder) == "table":
        if split:
            raise InputError(f"{folder}:{split}: expected a folder with splits, got one data set")
        return [Part(folder, None, False)]
    paths = _paths_below(folder)
    kinds = {path: None if path.is_dir() else kind_by_name(path) for path in paths}
    data = [
        path
        for path, kind in kinds.items()
        if path.is_dir() or (kind and not kind.is_text and path.name not in NOT_DATA)
    ]
    chosen = data or _texts_of(folder, kinds)
    if not chosen:
        raise InputError(f"{folder}: expected a folder with files in it, found none")
    if data and len(data) < len(paths):
        others = [path for path in paths if path not in set(data)]
        logger.warning(
            "%s: %s left out: no rows of data. Fix: give a file by its own name to read it",
            folder,
            name_some(path.relative_to(folder) for path in others),
        )
    splits = _splits_of(folder, chosen, is_text=not data)
    if split:
        wanted = {split, usual_split(split) or split}
        chosen = [path for path in chosen if splits[path] in wanted]
        if not chosen:
            raise no_split(f"{folder}:{split}", folder, splits.values())
    elif any(name != usual_split(name) for name in splits.values()):
        raise no_split(str(folder), folder, splits.values())
    held_out = [path for path in chosen if is_evaluation(splits[path])]
    if held_out:
        logger.info(
            "%s: %s held out for evaluation, as the name says",
            folder,
            name_some(path.relative_to(folder) for path in held_out),
        )
    unknown = FileKind("text", "")
    return [
        Part(path, None if path.is_dir() else kinds[path] or unknown, path in set(held_out))
        for path in chosen
    ]


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder at any depth, sorted by path.

    Hidden ones (a name in the path begins with a dot) are left out.

    Raises:
        InputError: it holds none.
    """
    files = [
        Path(place, name)
        for place, folders, names in os.walk(folder)
        for name in names
        if _keep_visible(folders) and not name.startswith(".")
    ]
    if not files:
        raise InputError(f"{folder}: expected a folder with files in it, found none")
    return sorted(file for file in files if file.is_file())


def name_some(items: Iterable[object]) -> str:
    """Return the first few names, and how many there are."""
    names = list(map(str, items))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _keep_visible(folders: list[str]) -> bool:
    """Take hidden names out of the list that `os.walk` enters next."""
    folders[:] = [name for name in folders if not name.startswith(".")]
    return True


def _paths_below(folder: Path) -> list[Path]:
    """Return visible files, and folders of saved data sets, of which no file is listed."""
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        _keep_visible(folders)
        here = Path(place)
        if links := [here / name for name in folders if (here / name).is_symlink()]:
            logger.warning("%s: left out: links to folders are not followed", name_some(links))
        if kind := saved_kind(here):
            paths += [here / split for split in saved_splits(here)] if kind == "splits" else [here]
            folders.clear()
            continue
        paths += [here / name for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.is_dir() or path.is_file())


def _texts_of(folder: Path, kinds: dict[Path, FileKind | None]) -> list[Path]:
    """Return the files that are texts; others that are UTF-8 are taken, binary ones are not."""
    texts, guessed, binary = [], [], []
    for path, kind in kinds.items():
        if kind and kind.is_text:
            texts.append(path)
        elif kind is None and is_utf8(path):
            guessed.append(path)
        else:
            binary.append(path)
    names = [[path.relative_to(folder) for path in paths] for paths in (guessed, binary)]
    if guessed:
        logger.info("%s: %s read as texts: their suffix is not known", folder, name_some(names[0]))
    if binary:
        logger.warning("%s: %s left out: neither text nor rows", folder, name_some(names[1]))
    return sorted([*texts, *guessed])


def _splits_of(folder: Path, paths: Sequence[Path], *, is_text: bool) -> dict[Path, str]:
    """Return the split of each path, train where no name tells."""
    below = {path: PurePath(path.relative_to(folder)) for path in paths}
    folders = {parent for path in below.values() for parent in path.parents if parent.name}
    splits = {}
    for path, relative in below.items():
        if path.is_dir() and (path.parent / "dataset_dict.json").is_file():
            splits[path] = usual_split(path.name) or path.name
        else:
            splits[path] = split_of_file(relative, is_text=is_text, folders=folders) or "train"
    return splits
