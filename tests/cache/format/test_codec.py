"""Chunks of a shard, encoded by several threads."""

import os

import numpy as np
import pytest

from carryon.cache.format.codec import encode_shard


@pytest.mark.parametrize("cores", [1, 2, 4, 64])
def test_a_shard_has_the_same_bytes_on_any_number_of_cores(
    cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(0).integers(0, 2**14, (64, 8)).astype(np.uint16)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    expected = encode_shard(rows, rows_per_chunk=16)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    assert encode_shard(rows, rows_per_chunk=16) == expected
