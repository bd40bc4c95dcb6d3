"""Bytes of the tokens of a base, kept so that its tokenizer is read once.

Reading a tokenizer takes up to half a minute, from a .gguf file. Letters: V rows of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carryon.cache.errors import DamagedFileError
from carryon.train.mixing.tensor_cache import cached_tensors

_MAX_TOKEN_BYTES = 1 << 12
_MAX_BYTES_PER_TOKEN = 64
"""Mean of a vocabulary; real ones have 6 to 8."""
_RULE = 1
"""Of `token_bytes`: a change of what it gives is a change of this number."""
_KEYS = ("id", "revision", "weights_sha256", "tokenizer_sha256")

Words = tuple[Sequence[bytes | None], Sequence[int]]
"""Bytes of each token, None where it stands for no text; and the tokens that end a turn."""


def cached_words(
    base: Mapping[str, Any], *, vocab_size: int, compute: Callable[[], Words]
) -> Words:
    """Return the bytes of a base's tokens and its stop tokens, from the cache or computed now.

    The stop tokens are those at the first reading: a base that is edited later has the same name
    and digests.

    Args:
        base: identity that a store records.
        vocab_size: V.
        compute: reads the tokenizer, and checks that its digest is the recorded one.

    Raises:
        DiskFullError: the cache cannot be written.
    """
    key = {name: base.get(name) for name in _KEYS} | {"vocab_size": vocab_size, "rule": _RULE}
    return cached_tensors(
        "vocabulary",
        key,
        compute,
        max_bytes=(_MAX_BYTES_PER_TOKEN + 16) * vocab_size,
        pack=_pack,
        check=lambda tensors, path: _checked(tensors, vocab_size=vocab_size, path=path),
    )


def _pack(words: Words) -> dict[str, Tensor]:
    tokens, stops = words
    data = np.frombuffer(b"".join(token or b"" for token in tokens), dtype=np.uint8)
    return {
        "data": torch.from_numpy(data.copy()),
        "lengths": torch.tensor(
            [-1 if token is None else len(token) for token in tokens], dtype=torch.int32
        ),
        "stops": torch.tensor(list(stops), dtype=torch.int64),
    }


def _checked(tensors: Mapping[str, Tensor], *, vocab_size: int, path: Path) -> Words:
    """Return a vocabulary from tensors of a file.

    Raises:
        DamagedFileError: they are none.
    """
    kinds = {"data": torch.uint8, "lengths": torch.int32, "stops": torch.int64}
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
    return tokens, stops
