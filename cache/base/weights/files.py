"""Safetensors files of a base, read without counting as memory of this process for long.

Pages of a mapped file are resident memory of the process until the file is closed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import safe_open
from torch import Tensor

from carryon.cache.base.identity import row_parts
from carryon.cache.base.pretrained import PreTrainedModel

_MAX_MAPPED_BYTES = 32 << 20


class WeightFile:
    """A safetensors file whose weights are read in pieces; for one thread at a time.

    It is mapped, as safetensors 0.8 otherwise reads a whole tensor for each part of it, and opened
    again after some megabytes.
    """

    def __init__(self, path: str) -> None:
        """Open nothing yet."""
        self.path = path
        self._file: Any = None
        self._bytes_left = 0

    def names(self) -> list[str]:
        """Return the names of its weights."""
        return list(self._opened().keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight."""
        return tuple(self._opened().get_slice(name).get_shape())

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a weight in order, in the dtype of the file; a scalar as [].

        A piece is a view of the mapped file: memory is counted while it is kept.
        """
        shape = self.shape(name)
        for rows in row_parts(shape):
            saved = self._opened().get_slice(name)
            piece: Tensor = saved[rows] if shape else saved[...]
            self._bytes_left -= piece.nbytes
            yield piece

    def close(self) -> None:
        """Let go of the file; reading opens it again."""
        self._file = None

    def _opened(self) -> Any:  # noqa: ANN401 -- of safetensors
        if self._file is None or self._bytes_left <= 0:
            self._file = None  # before the next one is mapped
            self._file = safe_open(self.path, framework="pt", device="cpu", backend="mmap")
            self._bytes_left = _MAX_MAPPED_BYTES
        return self._file


@contextmanager
def reading_unmapped() -> Iterator[None]:
    """Let transformers read safetensors files instead of mapping them, until the block ends.

    Weights that are converted are copies: beside them all of a mapped file would stay in memory
    until the last one is made. transformers 5.23 has this way, but no setting for it. One that
    does not open them here maps them as before.
    """
    module: Any = sys.modules[PreTrainedModel.__module__]
    opener: Any = getattr(module, "safe_open", None)
    if opener is None:
        yield
        return
    module.safe_open = lambda path, **how: opener(path, **how | {"backend": "pread"})
    try:
        yield
    finally:
        module.safe_open = opener
