"""Losses on a fake GPU: no tensor on another device, and no wait of the host."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_gpu import CUDA, FakeGpu, HostWaitError, on_fake_gpu
from support.tiny_heads import HEADS, VOCABULARY, WIDTH, make_head

from carryon.cache.base.lm_head import FinalNorm, Head
from carryon.train.losses.cross_entropy import base_divergences, token_losses
from carryon.train.losses.frozen_head import FrozenHead, frozen_head, with_gradient_filter
from carryon.train.losses.sampled_softmax import sampled_head, with_sampled_softmax
from carryon.train.losses.ways import WAYS

NUM = 40
DTYPES = ["float32", "bfloat16"]


def _head(gpu: FakeGpu, dtype: str, **kind: Any) -> FrozenHead:  # noqa: ANN401
    own = make_head(**kind)
    norm = FinalNorm(
        kind="rms", eps=1e-6, weight=np.ones(WIDTH, np.float32), bias=None, weight_offset=0.0
    )
    head = Head(
        weight=own.weight.numpy(),
        bias=None if own.bias is None else own.bias.numpy(),
        logit_scale=own.logit_scale,
        softcap=own.softcap,
        norm=norm,
    )
    with gpu.setup():
        return frozen_head(head, device=CUDA, dtype=getattr(torch, dtype))


def _states(*, trained: bool = True) -> torch.Tensor:
    return torch.zeros(NUM, WIDTH, device=CUDA).requires_grad_(trained)


def _targets() -> torch.Tensor:
    return torch.zeros(NUM, dtype=torch.int64, device=CUDA)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@on_fake_gpu
def test_a_loss_and_its_gradient(gpu: FakeGpu, dtype: str, kind: dict[str, Any]) -> None:
    head, states = _head(gpu, dtype, **kind), _states()

    losses = token_losses(states, _targets(), head=head, chunk=16)
    losses.sum().backward()

    assert losses.device == CUDA
    assert states.grad is not None
    assert states.grad.device == CUDA
    assert gpu.waits == []


@pytest.mark.parametrize("dtype", DTYPES)
@on_fake_gpu
def test_a_loss_without_gradient(gpu: FakeGpu, dtype: str) -> None:
    losses = token_losses(_states(trained=False), _targets(), head=_head(gpu, dtype), chunk=16)

    assert losses.device == CUDA


@pytest.mark.parametrize("dtype", DTYPES)
@on_fake_gpu
def test_the_divergence_from_the_base(gpu: FakeGpu, dtype: str) -> None:
    states = _states()
    head = _head(gpu, dtype, softcap=6.0)

    base_divergences(states, _states(trained=False), head=head, chunk=16).sum().backward()

    assert states.grad is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@on_fake_gpu
def test_every_way_of_the_softmax(gpu: FakeGpu, dtype: str, way: str) -> None:
    head = replace(_head(gpu, dtype), way=way)
    states = _states(trained=False).to(head.dtype)
    [block] = head.blocks()

    softmax = WAYS[way](states, block, head, torch.zeros(NUM, device=CUDA))

    assert softmax.log_sum.device == CUDA
    made = softmax.mean if softmax.weights is None else softmax.weights
    assert made is not None
    assert made.device == CUDA


@on_fake_gpu
def test_a_sampled_softmax(gpu: FakeGpu) -> None:
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    counts[:50] = 1
    with gpu.setup():
        head = with_sampled_softmax(_head(gpu, "float32", has_bias=True), counts, 20)
    targets = torch.arange(30, 30 + NUM)  # of the host, where half are rare
    states = _states()

    rows = sampled_head(head, targets)
    token_losses(states, _targets(), head=rows, chunk=16).sum().backward()

    assert states.grad is not None
    assert gpu.waits == []


@on_fake_gpu
def test_a_gradient_filter_waits(gpu: FakeGpu) -> None:
    with gpu.setup():
        head = with_gradient_filter(_head(gpu, "float32"), 1e-3)

    with pytest.raises(HostWaitError, match="nonzero"):
        token_losses(_states(), _targets(), head=head, chunk=16)
