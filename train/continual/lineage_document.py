"""Limits of what the JSON documents of a lineage may say, checked once, when they are read.

A lineage may come from a stranger, who can make any digest valid. So every value has its type and
lies within a limit, a store inside the lineage has a name below it, and no link is followed from
it. Code that uses a `Lineage` relies on it. The limits are far above those of honest lineages.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedFileError, InputError, UnsafePathError
from carryon.cache.files.documents import read_sealed
from carryon.cache.files.regular import refuse_links, stat_below

MAX_INCREMENTS = 9999
"""Folders of versions have four digits."""
_MAX_STORES = 4096
_MAX_STEPS = 1 << 40
_MAX_TEXT = 4096
_MAX_SETTINGS = 1024
_FIX = "put a copy of the original file there"
_STORE = re.compile(r"[^\0\n]+#[1-9][0-9]{0,8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOSS_NAME = re.compile(r"(?:base|[1-9][0-9]{0,3}) on [1-9][0-9]{0,3}")


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON document of a lineage.

    Raises:
        InputError: it is no regular file or not JSON, or differs from its digest.
    """
    try:
        return read_sealed(path)
    except DamagedFileError as error:
        raise InputError(f"{error}. Fix: {_FIX}") from error


def check_lineage(values: Mapping[str, Any], *, path: Path) -> None:
    """Check the values of a lineage.json, without its format and digest.

    Raises:
        InputError: names the first that is wrong.
    """
    try:
        if odd := set(values) ^ {"base", "alpha", "settings", "predecessor", "increments"}:
            raise ValueError(f"{min(odd)!a:.80}: expected as a key only if it is known")
        _flat(values["base"], "base")
        _whole({"num_layers": 1, **values["base"]}, "num_layers", 1, 1 << 16)
        _number(values["alpha"], "alpha", 0, 1)
        _flat(values["settings"], "settings")
        if not isinstance(increments := values["increments"], list):
            raise TypeError(f"increments: expected a list, got {_shown(increments)}")
        if len(increments) > MAX_INCREMENTS:
            raise ValueError(f"increments: expected {MAX_INCREMENTS} at most")
        for increment in increments:
            _check_increment(increment)
        if values["predecessor"] is not None:
            _check_predecessor(values["predecessor"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}. Fix: {_FIX}") from error


def check_texts(values: Mapping[str, Any], *, path: Path) -> dict[str, str]:
    """Return the places in a texts.json, by the SHA-256 of the content.

    Raises:
        InputError: names the first that is wrong.
    """
    for digest, place in values.items():
        is_text = isinstance(place, str) and 0 < len(place) <= _MAX_TEXT and "\0" not in place
        if (
            not is_text
            or not _DIGEST.fullmatch(digest)
            or (place[:2] == "./" and _leaves(place[2:]))
        ):
            raise InputError(
                f"{path}: expected a SHA-256 and a place, got {_shown(digest)} and "
                f"{_shown(place)}. Fix: delete {path}; a new base then needs --data"
            )
    return dict(values)


def is_loss(name: str, loss: object) -> bool:
    """Tell whether an entry of a versions.json is a loss that was measured."""
    if isinstance(loss, int | float):  # older ones
        loss = {"loss": loss, "se": None, "targets": None}
    try:
        if not isinstance(loss, dict) or set(loss) != {"loss", "se", "targets"}:
            return False
        _number(loss["loss"], "loss", 0, 1e6)
        if loss["se"] is not None:
            _number(loss["se"], "se", 0, 1e6)
        if loss["targets"] is not None:
            _whole(loss, "targets", 0, 1 << 53)
    except (TypeError, ValueError):
        return False
    return _LOSS_NAME.fullmatch(name) is not None


def refuse_link(root: Path, path: Path) -> None:
    """Check that a folder below `root`, and each on the way to it, is a folder or missing.

    Raises:
        InputError: one is a link or something else.
    """
    try:
        refuse_links(root, path)
    except UnsafePathError as error:
        raise InputError(f"{error.problem}. Fix: move the folder there") from error


def refuse_folder(path: Path) -> None:
    """Check that a file is a regular one, or missing.

    Raises:
        InputError: it is a link, a folder or a device.
    """
    try:
        stat_below(path.parent, path.name)
    except FileNotFoundError:
        return
    except UnsafePathError as error:
        raise InputError(f"{error.problem}. Fix: move it away") from error


def _check_increment(increment: object) -> None:
    if not isinstance(increment, dict) or set(increment) != {"stores", "fingerprints", "steps"}:
        raise TypeError(
            f"increments: expected stores, fingerprints and steps, got {increment!a:.80}"
        )
    stores, fingerprints = increment["stores"], increment["fingerprints"]
    if not isinstance(stores, list) or not 1 <= len(stores) <= _MAX_STORES:
        raise TypeError(f"stores: expected 1 to {_MAX_STORES} names, got {_shown(stores)}")
    for store in stores:
        is_name = isinstance(store, str) and len(store) <= _MAX_TEXT and _STORE.fullmatch(store)
        if not is_name or (not Path(store).is_absolute() and _leaves(store)):
            raise ValueError(f"stores: expected STORE#NUMBER, got {_shown(store)}")
    if (
        not isinstance(fingerprints, list)
        or len(fingerprints) != len(stores)
        or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in fingerprints)
    ):
        raise ValueError(
            f"fingerprints: expected a SHA-256 for each store, got {_shown(fingerprints)}"
        )
    _whole(increment, "steps", 1, _MAX_STEPS)


def _check_predecessor(values: object) -> None:
    if not isinstance(values, dict) or len(values) > _MAX_SETTINGS:
        raise TypeError(f"predecessor: expected an object, got {_shown(values)}")
    _text(values.get("lineage"), "lineage")
    _whole(values, "version", 1, MAX_INCREMENTS)
    _flat(values.get("base", {}), "base")
    known = values.get("fingerprints", [])
    if not isinstance(known, list) or not all(isinstance(each, str) for each in known):
        raise TypeError(f"fingerprints: expected texts, got {_shown(known)}")
    for name in ("kept_weights", "new_weights"):
        if name in values:
            _whole(values, name, 0, _MAX_STEPS)
    for name in ("base_nll", "start_nll", "from_old_nll", "from_scratch_nll"):
        if values.get(name) is not None:
            _number(values[name], name, 0, 1e6)


def _leaves(name: str) -> bool:
    """Tell whether a relative path is not in normal form, or leads out of its folder."""
    parts = name.split("/")
    return any(part in ("", ".", "..") for part in parts)


def _flat(values: object, name: str) -> None:
    """Check an object of plain values and lists of them."""
    if not isinstance(values, dict) or len(values) > _MAX_SETTINGS:
        raise TypeError(f"{name}: expected an object, got {_shown(values)}")
    for key, value in values.items():
        many = value if isinstance(value, list) else [value]
        if len(many) > _MAX_SETTINGS:
            raise ValueError(f"{key!a:.80}: expected {_MAX_SETTINGS} values at most")
        for one in many:
            if isinstance(one, str):
                _text(one, f"{key!a:.80}", least=0)
            elif one is not None and not isinstance(one, int | float):
                raise TypeError(f"{key!a:.80}: expected a plain value, got {_shown(value)}")


def _text(value: object, name: str, *, least: int = 1) -> None:
    if not isinstance(value, str) or not least <= len(value) <= _MAX_TEXT or "\0" in value:
        raise TypeError(f"{name}: expected a text, got {_shown(value)}")


def _whole(values: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = values.get(name)
    if type(value) is not int or not least <= value <= most:  # a bool is an int
        raise ValueError(f"{name}: expected {least} to {most}, got {_shown(value)}")


def _number(value: object, name: str, least: float, most: float) -> None:
    is_number = isinstance(value, int | float)
    if not is_number or not least <= value <= most or not math.isfinite(value):  # type: ignore[operator, arg-type]
        raise ValueError(f"{name}: expected {least:g} to {most:g}, got {_shown(value)}")


def _shown(value: object) -> str:
    """Return the beginning of a value, in one line of ASCII."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # an int of too many digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
