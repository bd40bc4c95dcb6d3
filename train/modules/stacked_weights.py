"""A carry-on module of which each row of a batch has weights of its own.

The module is the one that was trained; only its matrices and norms are exchanged for ones that
take a weight for each row. So rows of different carry-ons of one shape go through one forward
pass, and a row without a carry-on, whose weights are all zero, gets a delta of exactly 0.
Letters: B rows, T positions, I and O widths of a matrix, D of a norm.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.train.modules.carryon import CarryOn


class RowLinear(nn.Module):
    """nn.Linear with a weight for each row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the weights [B, O, I] and biases [B, O] as they are."""
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else bias.unsqueeze(1)  # [B, 1, O]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [B, T, O] for [B, T, I]."""
        matrices = self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(inputs, matrices)
        return torch.baddbmm(self.bias, inputs, matrices)


class RowNorm(nn.Module):
    """nn.RMSNorm with a weight for each row."""

    def __init__(self, weight: Tensor, eps: float | None) -> None:
        """Take the weights [B, D] as they are."""
        super().__init__()
        self.weight = weight.unsqueeze(1)  # [B, 1, D]
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [B, T, D] for [B, T, D]."""
        return nn.functional.rms_norm(inputs, inputs.shape[-1:], None, self.eps) * self.weight


def with_weights(
    shape: CarryOn,
    rows: Sequence[Mapping[str, Tensor] | None],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> CarryOn:
    """Return a carry-on that computes row b with the weights `rows[b]`; `shape` is not changed.

    Args:
        shape: any carry-on of that shape.
        rows: for each row the weights by name, or None for a row without a carry-on. One row alone
            serves a batch of any size.
        device: where it is to run.
        dtype: of its weights; buffers, such as rotary frequencies, keep theirs.
    """
    module = copy.deepcopy(shape).requires_grad_(False).eval().to(device)
    if len(rows) == 1 and rows[0] is not None:
        for name, parameter in module.named_parameters():
            parameter.data = rows[0][name].to(device, dtype)
        return module
    for path, child in list(module.named_modules()):
        own = dict(child.named_parameters(recurse=False))
        if own:
            stacked = {
                name: _stack(f"{path}.{name}", weight, rows).to(device, dtype)
                for name, weight in own.items()
            }
            _exchange_(module, path, child, stacked)
    return module


def _stack(name: str, like: Tensor, rows: Sequence[Mapping[str, Tensor] | None]) -> Tensor:
    """Return the weights `name` of all rows, [B, ...], in the type they are kept in."""
    kept = next((row[name].dtype for row in rows if row is not None), like.dtype)
    stacked = torch.zeros(len(rows), *like.shape, dtype=kept)
    for number, row in enumerate(rows):
        if row is not None:
            stacked[number] = row[name]
    return stacked


def _exchange_(root: nn.Module, path: str, child: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if isinstance(child, nn.Linear):
        root.set_submodule(path, RowLinear(weights["weight"], weights.get("bias")))
    elif isinstance(child, nn.RMSNorm):
        root.set_submodule(path, RowNorm(weights["weight"], child.eps))
    elif set(weights) == {"weight"} and weights["weight"].ndim == 2:
        # A norm of transformers: it multiplies by its weight, which [B, 1, D] spreads to rows.
        child.weight = nn.Parameter(weights["weight"].unsqueeze(1), requires_grad=False)
    else:
        raise InputError(
            f"{path}: expected matrices and norms, got {type(child).__name__}; carry-ons of this "
            "kind cannot be mixed in one batch"
        )
