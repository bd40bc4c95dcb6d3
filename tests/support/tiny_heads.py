"""Small frozen heads of every kind: 300 rows of width 16, in blocks of 128."""

import torch

from carryon.train.losses.frozen_head import FrozenHead

WIDTH, VOCABULARY, BLOCK_ROWS = 16, 300, 128
HEADS = [
    {},
    {"has_bias": True},
    {"logit_scale": 0.5},
    {"softcap": 6.0},
    {"has_bias": True, "logit_scale": 0.7, "softcap": 6.0},
]
"""Arguments of `make_head`."""


def make_head(
    *,
    mean: float = 0.0,
    has_bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> FrozenHead:
    """Return a head whose rows are random around `mean`."""
    random = torch.Generator().manual_seed(1)
    rows = mean + torch.randn(VOCABULARY, WIDTH, generator=random)
    return FrozenHead(
        weight=rows,
        bias=torch.randn(VOCABULARY, generator=random) if has_bias else None,
        logit_scale=logit_scale,
        softcap=softcap,
        dtype=torch.float32,
        device=torch.device("cpu"),
        block_rows=BLOCK_ROWS,
    )
