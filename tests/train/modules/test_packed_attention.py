"""Attention over packed samples: what reaches torch's kernel."""

from typing import Any

import pytest
import torch
from torch import nn

from carryon.train.modules.packed_attention import _attention, pack

PACKING = pack(torch.tensor([3, 5]))


def test_no_kernel_that_is_compiled_for_each_shape_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allowed = []
    real = nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return real(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    heads = torch.randn(1, 2, 8, 4)
    _attention(nn.Identity(), heads, heads, heads, None, packing=PACKING)

    assert allowed == [False]
