"""Bytes of the tokens of a base, kept so that its tokenizer is read once.

Reading a tokenizer takes up to half a minute, from a .gguf file. The base need not be there any
more; where it is, and its settings are others than at the reading, it is read again, as they name
the tokens that end a turn. Letters: V rows of a head.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryon.cache.errors import CarryOnError, DamagedFileError
from carryon.cache.files.documents import read_bounded
from carryon.train.mixing.tensor_cache import cached_tensors

_MAX_TOKEN_BYTES = 1 << 12
_MAX_BYTES_PER_TOKEN = 64
"""Mean of a vocabulary; real ones have 6 to 8."""
_RULE = 2
"""Of `token_bytes` and of the file: a change of what they give is a change of this number."""
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files of a base of which the tokens that end a turn are read."""
_MAX_SETTINGS_BYTES = 96 << 20
_KEYS = ("id", "revision", "weights_sha256", "tokenizer_sha256")

Words = tuple[Sequence[bytes | None], Sequence[int]]
"""Bytes of each token, None where it stands for no text; and the tokens that end a turn."""


def cached_words(
    base: Mapping[str, Any], *, vocab_size: int, compute: Callable[[], Words]
) -> Words:
    """Return the bytes of a base's tokens and its stop tokens, from the cache or computed now.

    Args:
        base: identity that a store records.
        vocab_size: V.
        compute: reads the tokenizer, and checks that its digest is the recorded one.

    Raises:
        DiskFullError: the cache cannot be written.
    """
    key = {name: base.get(name) for name in _KEYS} | {"vocab_size": vocab_size, "rule": _RULE}
    settings = _digest_settings(base)

    def check(tensors: Mapping[str, Tensor], path: Path) -> Words:
        words, read = _checked(tensors, vocab_size=vocab_size, path=path)
        if settings and settings != read:
            raise DamagedFileError(f"{path}: expected the settings of {base.get('id')}, got others")
        return words

    return cached_tensors(
        "vocabulary",
        key,
        compute,
        max_bytes=(_MAX_BYTES_PER_TOKEN + 16) * vocab_size + 32,
        pack=lambda words: _pack(words, settings),
        check=check,
    )


def _digest_settings(base: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of the settings of a base in a folder; empty where there are none.

    A base of the hub is recorded with its commit, which never changes.
    """
    digest, num_found = hashlib.sha256(), 0
    for name in () if base.get("revision") else _SETTINGS:
        try:  # files of the hub's cache are links
            path = Path(os.path.realpath(Path(str(base.get("id")), name)))
            content = read_bounded(path, max_bytes=_MAX_SETTINGS_BYTES)
        except (CarryOnError, OSError, ValueError):
            continue
        digest.update(f"{name} {len(content)} ".encode() + content)
        num_found += 1
    return digest.digest() if num_found else b""


def _pack(words: Words, settings: bytes) -> dict[str, Tensor]:
    tokens, stops = words
    data = np.frombuffer(b"".join(token or b"" for token in tokens), dtype=np.uint8)
    return {
        "data": torch.from_numpy(data.copy()),
        "lengths": torch.tensor(
            [-1 if token is None else len(token) for token in tokens], dtype=torch.int32
        ),
        "stops": torch.tensor(list(stops), dtype=torch.int64),
        "settings": torch.tensor(list(settings), dtype=torch.uint8),
    }


def _checked(tensors: Mapping[str, Tensor], *, vocab_size: int, path: Path) -> tuple[Words, bytes]:
    """Return a vocabulary from tensors of a file, and the digest of the settings at its reading.

    Raises:
        DamagedFileError: they are none.
    """
    kinds = {
        "data": torch.uint8,
        "lengths": torch.int32,
        "stops": torch.int64,
        "settings": torch.uint8,
    }
    shown = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
    if shown != {name: (dtype, 1) for name, dtype in kinds.items()}:
        raise DamagedFileError(f"{path}: expected {', '.join(kinds)}, got {sorted(shown)!a:.80}")
    lengths, stops = tensors["lengths"].tolist(), tensors["stops"].tolist()
    if len(lengths) != vocab_size or not all(-1 <= each <= _MAX_TOKEN_BYTES for each in lengths):
        raise DamagedFileError(
            f"{path}: expected the lengths of {vocab_size:,} tokens, each at most "
            f"{_MAX_TOKEN_BYTES:,} bytes"
        )
    data = tensors["data"].numpy().tobytes()
    if len(data) != sum(max(each, 0) for each in lengths):
        raise DamagedFileError(f"{path}: expected as many bytes as all tokens have")
    if not all(0 <= stop < vocab_size for stop in stops):
        raise DamagedFileError(f"{path}: expected stop tokens below {vocab_size:,}")
    tokens: list[bytes | None] = []
    at = 0
    for length in lengths:
        tokens.append(None if length < 0 else data[at : at + length])
        at += max(length, 0)
    return (tokens, stops), bytes(tensors["settings"].tolist())
