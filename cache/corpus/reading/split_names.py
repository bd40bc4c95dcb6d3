"""Splits of a data set, told by the names of splits, files and folders."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from carryon.cache.errors import InputError

logger = logging.getLogger(__name__)

_KEYWORDS = {  # as in datasets.data_files.SPLIT_KEYWORDS; a test compares
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_USUAL = {word: split for split, words in _KEYWORDS.items() for word in words}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5,}")
"""Of the files of a data set on the hub, such as train_sft-00000-of-00003."""


def usual_split(name: str) -> str:
    """Return train, validation or test where `name` is a usual name of it; else empty."""
    return _USUAL.get(name.lower(), "")


def keyword_in(name: str) -> str:
    """Return train, validation or test where a word of `name` says so; else empty.

    Where the words disagree, the name is one of data to evaluate on: `test` of "train_test".
    """
    found = {usual_split(word) for word in re.split(r"[-._ 0-9]+", name)}
    return next((split for split in ("test", "validation", "train") if split in found), "")


def is_evaluation(split: str) -> bool:
    """Return whether the name of a split says that it is not for training."""
    return keyword_in(split) in ("test", "validation")


def split_of_file(path: PurePath, *, is_text: bool, folders: Iterable[PurePath] = ()) -> str:
    """Return the split that a file in a folder belongs to; empty where no name says so.

    A table or JSON file: of a hub's shard, its prefix; else the first of its name and its folders
    that has a keyword. A text, whose name may speak of tests: its whole stem, or a folder with such
    a name beside one for training.

    Args:
        path: below the folder that was given.
        is_text: whether the file is one document.
        folders: all folders below the one given, of texts.
    """
    stem = path.name.partition(".")[0]
    if is_text:
        if usual_split(stem):
            return usual_split(stem)
        trained = {folder.parent for folder in folders if usual_split(folder.name) == "train"}
        named = [usual_split(f.name) for f in path.parents if f.name and f.parent in trained]
        return next(filter(None, named), "")
    shard = _SHARD.match(path.name)
    if shard and keyword_in(shard[1]):
        return usual_split(shard[1]) or shard[1]
    names = [stem, *(folder.name for folder in path.parents)]
    return next(filter(None, map(keyword_in, names)), "")


def choose_splits(name: str, split: str, splits: Sequence[str]) -> list[str]:
    """Return the splits of a data set to read: the one named, or all where names say what for.

    Raises:
        InputError: no such split, or names that are not those of training and evaluation; the text
            lists all splits as they are typed.
    """
    if split:
        if split not in splits:
            raise no_split(f"{name}:{split}", name, splits)
        return [split]
    if not splits or not all(map(usual_split, splits)):
        raise no_split(name, name, splits)
    return list(splits)


def log_split(name: str, split: str) -> bool:
    """Return whether a split is for evaluation by its name, and log that if so."""
    if is_evaluation(split):
        logger.info("%s: held out for evaluation, as its name says", f"{name}:{split}")
    return is_evaluation(split)


def no_split(name: str, source: object, splits: Iterable[str]) -> InputError:
    """Return the error for splits of `source` among which `name` finds none to read."""
    names = sorted({split or "train" for split in splits})
    typed = ", ".join(f"{source}:{split}" for split in names)
    return InputError(
        f"{name}: expected splits whose names say train, validation or test, or the name of one, "
        f"got {', '.join(names) or 'none'}. Fix: give {typed or 'data with rows'}"
    )
