"""A base that a file names: the manifest of a store, or the card of a carry-on.

Such a file may come from anyone. What is found at the name is used only if it has the digests that
the file records: config, tokenizer and chat template before any of them is used, weights before
the first forward pass. Its weights are quantized as the file says; code that comes with it runs
only where the user says so.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from carryon.cache.base.identity import ON_LOAD, refuse_other_digests
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings

logger = logging.getLogger(__name__)

_REQUIRED = ("config_sha256", "tokenizer_sha256", "weights_sha256")


def load_recorded_base(
    recorded: Mapping[str, Any],
    *,
    where: str | Path,
    forward: ForwardSettings,
    has_own_template: bool = False,
) -> Base:
    """Load the base that a file names, and say so in the log.

    Args:
        recorded: identity of the base, as plain values.
        where: the store or carry-on that names it.
        forward: how the base is run.
        has_own_template: whether the recorded chat template is another than the base's own.

    Raises:
        InputError: a digest is not recorded.
        SettingMismatchError: something else is found at the name.
        MissingError: nothing is found there.
    """
    source = recorded_source(recorded, where=where)
    if missing := [key for key in _REQUIRED if not isinstance(recorded.get(key), str)]:
        raise InputError(
            f"{where}: expected the {missing[0]} of its base, which is not recorded. Fix: give the "
            "base with --base"
        )
    expected = {key: recorded[key] for key in _REQUIRED}
    expected |= {key: recorded.get(key) for key in ("quantization", "code_sha256")}
    forward = recorded_forward(forward, recorded)
    if not has_own_template:
        expected["chat_template_sha256"] = recorded.get("chat_template_sha256")
    base = load_base(source, forward=forward, expected=expected)
    refuse_other_digests(expected, base.identity.to_dict(), where=f"base {source}")
    return base


def recorded_forward(forward: ForwardSettings, recorded: Mapping[str, Any]) -> ForwardSettings:
    """Return settings that quantize a base on load as a file records, unless they say how."""
    name = recorded.get("quantization")
    if forward.quantize != "none" or name not in ON_LOAD:
        return forward
    return replace(forward, quantize=name)


def tokenizer_of(recorded: Mapping[str, Any]) -> str | None:
    """Return the digest of the tokenizer that a file records of its base; None for none."""
    digest = recorded.get("tokenizer_sha256")
    return digest if isinstance(digest, str) else None


def recorded_source(recorded: Mapping[str, Any], *, where: str | Path) -> str:
    """Return the name of the base that the file `where` records, and log it.

    Raises:
        InputError: it is no text.
    """
    name, revision = recorded.get("id"), recorded.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise InputError(
            f"{where}: expected the name of its base, got {name!r:.80}. Fix: give it with --base"
        )
    source = f"{name}@{revision}" if revision else name
    is_local = Path(name).expanduser().exists()
    logger.info(f"base {source}: named by {where}, {'on this disk' if is_local else 'on the hub'}")
    return source
