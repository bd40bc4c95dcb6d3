"""Linear layers that need little memory when their weights are bfloat16.

A CPU without bfloat16 units multiplies it six times slower than float32. There the products are
computed in float32, from widened copies of some tokens or some weights at a time. Sums over tokens,
such as gradients of weights, stay in float32 until complete. Letters: N tokens, I and O widths of a
matrix.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

_ROWS = 512
"""Tokens that are widened at one time."""
_CHANNELS = 512
"""Rows of a matrix that are widened at one time."""


class Product(nn.Linear):
    """A linear layer that can multiply in another dtype than that of its weights."""

    wide: torch.dtype | None = None
    """Of the products. None: that of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., O] for [..., I], in the dtype of `x`."""
        if self.wide is None:
            return super().forward(x)
        out = product(x, self.weight, self.wide)
        return out if self.bias is None else out + self.bias


def product(
    x: Tensor, weight: Tensor, wide: torch.dtype | None, *, scale: Tensor | None = None
) -> Tensor:
    """Return x [..., I] * scale [I] times weight [O, I]; the scale is folded into the weights.

    Multiplied in `wide`, which keeps no scaled copy of the weights. None: in their own dtype.
    """
    if wide is None:
        return nn.functional.linear(x, weight if scale is None else weight * scale)
    out: Tensor = _Product.apply(x.flatten(0, -2), weight, wide, scale)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def gated_product(
    x: Tensor, gate: nn.Module, value: nn.Module, kind: Literal["silu", "sigmoid"]
) -> Tensor:
    """Return kind(gate(x)) * value(x); where `wide` is set, backward keeps only `x`."""
    if (
        isinstance(gate, Product)
        and isinstance(value, Product)
        and value.wide is not None
        and gate.weight.shape == value.weight.shape
    ):
        out: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), gate.weight, gate.bias, value.weight, value.wide, kind
        )
        return out.view(*x.shape[:-1], -1)
    act = nn.functional.silu if kind == "silu" else torch.sigmoid
    gated: Tensor = act(gate(x)) * value(x)
    return gated


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), keeping only the inputs for the backward pass.

    torch's checkpoints import its compiler, 70 MB. The weights of `function` get their gradients
    during recomputation, so each weight may be used in one such call only.
    """
    out: Tensor = _Recomputed.apply(function, *inputs)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # noqa: ANN401
        ctx.function = function
        kind = inputs[0].device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            out = ctx.function(*inputs)
            # If backward is given the gradient, torch imports sympy to compare shapes: 30 MB.
            slope: Tensor = _Slope.apply(out, grads[0])  # type: ignore[no-untyped-call]
        torch.autograd.backward(slope)
        return None, *(x.grad for x in inputs)


class _Slope(torch.autograd.Function):
    """A scalar whose gradient to `out` is `grad`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(grad)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return ctx.saved_tensors[0], None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        wide: torch.dtype,
        scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.wide = wide
        columns, out = _scaled(weight, scale, wide).t(), x.new_empty(len(x), len(weight))
        for part in _parts(len(x), _ROWS):
            out[part] = x[part].to(wide) @ columns
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, scale = ctx.saved_tensors
        grad, wide, grad_x, grad_scale = grads[0], ctx.wide, None, None
        if ctx.needs_input_grad[0]:
            wide_weight, grad_x = _scaled(weight, scale, wide), torch.empty_like(x)
            for part in _parts(len(x), _ROWS):
                grad_x[part] = grad[part].to(wide) @ wide_weight
            del wide_weight
        total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        for part in _parts(len(x), _ROWS):
            total.addmm_(grad[part].to(wide).t(), x[part].to(wide))
        if scale is not None:
            grad_scale = (total * weight).sum(dim=0).to(scale.dtype)
            total.mul_(scale)
        return grad_x, total.to(weight.dtype), None, grad_scale


class _Gated(torch.autograd.Function):
    """Some rows of both matrices at a time, so that no [N, O] is ever in float32."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        gate: Tensor,
        bias: Tensor | None,
        value: Tensor,
        wide: torch.dtype,
        kind: str,
    ) -> Tensor:
        ctx.save_for_backward(x, gate, bias, value)
        ctx.wide, ctx.kind = wide, kind
        wide_x, out = x.to(wide), x.new_empty(len(x), len(value))
        for part in _parts(len(value), _CHANNELS):
            a = _gates(wide_x, gate, bias, part)
            act = nn.functional.silu(a) if kind == "silu" else torch.sigmoid(a)
            out[:, part] = act.mul_(wide_x @ value[part].to(wide).t())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, gate, bias, value = ctx.saved_tensors
        wide = ctx.wide
        wide_x = x.to(wide)
        grad_x, grad_gate, grad_value = (
            torch.zeros_like(wide_x),
            torch.empty_like(gate),
            torch.empty_like(value),
        )
        grad_bias = None if bias is None else torch.empty_like(bias)
        for part in _parts(len(value), _CHANNELS):
            a, grad = _gates(wide_x, gate, bias, part), grads[0][:, part].to(wide)
            sigmoid = torch.sigmoid(a)
            act = a * sigmoid if ctx.kind == "silu" else sigmoid
            grad_v = grad * act
            grad.mul_(wide_x @ value[part].to(wide).t())  # of the activation
            slope = 1 - sigmoid if ctx.kind == "sigmoid" else a.mul_(1 - sigmoid).add_(1)
            grad_a = grad.mul_(slope.mul_(sigmoid))
            grad_value[part] = grad_v.t() @ wide_x
            grad_gate[part] = grad_a.t() @ wide_x
            if grad_bias is not None:
                grad_bias[part] = grad_a.sum(dim=0)
            grad_x.addmm_(grad_v, value[part].to(wide))
            grad_x.addmm_(grad_a, gate[part].to(wide))
        return grad_x.to(x.dtype), grad_gate, grad_bias, grad_value, None, None


def _scaled(weight: Tensor, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    return weight.to(wide) if scale is None else weight.to(wide) * scale


def _gates(x: Tensor, gate: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    logits = x @ gate[part].to(x.dtype).t()
    return logits if bias is None else logits.add_(bias[part])


def _parts(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))
