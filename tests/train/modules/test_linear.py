"""The lean ways give what the plain ones give."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from carryon.train.modules import linear as products
from carryon.train.modules.decoder import Decoder
from carryon.train.modules.linear import Product, gated_product, recomputed
from carryon.train.modules.packed_attention import pack

TOKENS, WIDTH, HEADS, OUT = 7, 8, 2, 12
SHAPE = {"width": WIDTH, "blocks": 2, "heads": HEADS, "intermediate_size": OUT}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 3 tokens and of 5 channels, neither of which divides all."""
    monkeypatch.setattr(products, "_ROWS", 3)
    monkeypatch.setattr(products, "_CHANNELS", 5)


def _product(seed: int, *, bias: bool = False) -> Product:
    torch.manual_seed(seed)
    return Product(WIDTH, OUT, bias=bias)


def _found(out: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    slopes = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out.detach(), *torch.autograd.grad((out.float() * slopes).sum(), weights)]


def _assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], error: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=error, atol=error)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_lean_products_and_their_gradients_equal_plain_ones(
    dtype: torch.dtype, error: float
) -> None:
    def run(wide: torch.dtype | None, to: torch.dtype) -> list[list[Tensor]]:
        found = []
        for kind in ("", "silu", "sigmoid"):
            gate, value = _product(1, bias=True).to(dtype).to(to), _product(2).to(dtype).to(to)
            gate.wide = value.wide = wide
            torch.manual_seed(3)
            x = torch.randn(TOKENS, WIDTH).to(dtype).to(to).requires_grad_()
            if kind == "":
                found.append(_found(gate(x), [x, *gate.parameters()]))
            else:
                out = gated_product(x, gate, value, kind)  # type: ignore[arg-type]
                found.append(_found(out, [x, *gate.parameters(), *value.parameters()]))
        return found

    for lean, plain in zip(run(torch.float32, dtype), run(None, torch.float32), strict=True):
        assert lean[0].dtype == dtype
        _assert_close(lean, plain, error)


@pytest.mark.parametrize("wide", [None, torch.float32])
def test_a_scale_of_the_input_goes_into_the_weights(wide: torch.dtype | None) -> None:
    module = _product(1)
    torch.manual_seed(3)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    scale = torch.randn(WIDTH, requires_grad=True)
    leaves = [x, module.weight, scale]

    found = _found(products.product(x, module.weight, wide, scale=scale), leaves)

    _assert_close(found, _found(module(x * scale), leaves), 1e-5)


def test_what_is_computed_again_gives_the_same_gradients() -> None:
    product = _product(0)
    gradients = []
    for way in (lambda x: product(x).tanh(), lambda x: recomputed(lambda y: product(y).tanh(), x)):
        product.zero_grad()
        x = torch.ones(TOKENS, WIDTH, requires_grad=True)
        torch.autograd.backward(way(x).square().sum())
        assert x.grad is not None
        assert product.weight.grad is not None
        gradients.append((x.grad, product.weight.grad.clone()))

    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def _llama() -> nn.Module:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=OUT,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=1,
    )
    return LlamaModel(config)


def test_a_seeds_first_weights_are_those_of_transformers_llama() -> None:
    torch.manual_seed(6)
    ours, after = Decoder(**SHAPE).state_dict(), torch.rand(1)
    torch.manual_seed(6)
    theirs, theirs_after = _llama().state_dict(), torch.rand(1)

    assert [*ours, "embed_tokens.weight"] == sorted(theirs, key="embed_tokens.weight".__eq__)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert torch.equal(after, theirs_after)


def _decoders() -> tuple[Decoder, nn.Module]:
    torch.manual_seed(0)
    ours, theirs = Decoder(**SHAPE), _llama()
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    theirs.load_state_dict({**ours.state_dict(), "embed_tokens.weight": torch.zeros(1, WIDTH)})
    return ours, theirs


def test_the_body_is_transformers_llama() -> None:
    ours, theirs = _decoders()
    x = torch.randn(2, TOKENS, WIDTH)

    torch.testing.assert_close(
        ours(inputs_embeds=x), theirs(inputs_embeds=x).last_hidden_state, rtol=1e-5, atol=1e-5
    )


def test_recomputing_changes_no_gradient_of_the_body() -> None:
    body, _ = _decoders()
    packing = pack(torch.tensor([4, TOKENS - 4]))
    found = []
    for body.recompute in (False, True):
        body.zero_grad()
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
        x.requires_grad_()
        out = body(inputs_embeds=x, position_ids=packing.position_ids, packing=packing)
        torch.autograd.backward(out.square().sum())
        found.append([x.grad, *(weight.grad for weight in body.parameters())])

    _assert_close(found[1], found[0], 1e-5)  # type: ignore[arg-type]


def test_the_trainer_imports_neither_transformers_nor_torchs_compiler() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch, carryon.train.trainer.trainer\n"
        "import carryon.train.optim.lowbit_adamw as lean\n"
        "weight = torch.nn.Parameter(torch.ones(3))\n"
        "lean.LowBitAdamW([{'params': [weight]}], lr=1, betas=(0, 0), weight_decay=0, bits=8, "
        "seed=0).zero_grad()\n"
        "from carryon.train.modules.linear import recomputed\n"
        "torch.autograd.backward(recomputed(lambda x: 2 * x, weight).sum())\n"
        "assert weight.grad.tolist() == [2, 2, 2]\n"
        "names = ('transformers', 'torch._dynamo', 'scipy', 'sympy')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert done.stdout.strip() == "[]"
