"""The softmax over rows of the head as an accelerator computes it, on a CPU."""

import pytest
import torch

from carryon.train.losses import block_softmax
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock

WIDTH, ROWS, POSITIONS = 8, 300, 5


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_gives_log_sums_and_means(dtype: torch.dtype, softcap: float | None) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=random).to(dtype)
    states = torch.randn(POSITIONS, WIDTH, generator=random).to(dtype)
    cpu = torch.device("cpu")
    head = FrozenHead(
        weight=weight,
        bias=None,
        logit_scale=1.5,
        softcap=softcap,
        dtype=dtype,
        device=cpu,
        block_rows=ROWS,
    )
    block = HeadBlock(first=0, weight=weight, bias=None)

    logits, slopes = block_softmax.block_logits(states, block, head, with_slopes=True)
    log_sums = logits.double().logsumexp(dim=1)
    weights = (logits.double() - log_sums.unsqueeze(1)).exp()
    if slopes is not None:
        weights = weights * slopes.double()
    for with_mean in (True, False):
        found = block_softmax._in_one_kernel(
            logits.clone(), slopes, block, head, with_mean=with_mean
        )

        torch.testing.assert_close(found.log_sum.double(), log_sums, rtol=0, atol=1e-5)
        assert with_mean or (found.mean is None and found.weights is None)
        if dtype == torch.bfloat16 and found.mean is not None:
            expected = weights @ weight.double()
            torch.testing.assert_close(found.mean.double(), expected, rtol=0.02, atol=0.01)
        elif found.weights is not None:
            torch.testing.assert_close(found.weights.double(), weights, rtol=1e-4, atol=1e-6)
