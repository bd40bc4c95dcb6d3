"""Choices for a device: which attention kernels may run, and how many rows are widened at once."""

import pytest
import torch

from carryon.cache.device import DEFAULT_CHUNK, attention_of_any_shape, rows_at_once


def _has_cudnn_attention() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


def test_cudnn_attention_is_left_out_and_comes_back() -> None:
    before = _has_cudnn_attention()

    with attention_of_any_shape():
        assert not _has_cudnn_attention()

    with pytest.raises(ZeroDivisionError), attention_of_any_shape():
        raise ZeroDivisionError
    assert _has_cudnn_attention() == before


def test_an_accelerator_widens_many_rows_at_once() -> None:
    meta = torch.device("meta")

    assert rows_at_once(10_000, torch.device("cpu")) < DEFAULT_CHUNK <= rows_at_once(10_000, meta)
    assert rows_at_once(0, meta) == 1
