"""A carry-on that computes each row of a batch with its own weights.

The module is a copy of a trained one; its matrices and norms are replaced by ones with a weight
for each row. So rows of different carry-ons of one shape share a forward pass. A row without a
carry-on has zero weights and gets a delta of exactly 0.
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
        rows: for each row its weights by name, or None for a row without a carry-on. A single row
            serves a batch of any size.
        device: of the result.
        dtype: of its weights; buffers keep theirs.

    Raises:
        InputError: the module has weights besides matrices and norms.
    """
    module = copy.deepcopy(shape).requires_grad_(False).eval().to(device)
    if len(rows) == 1 and rows[0] is not None:
        for name, parameter in module.named_parameters():
            parameter.data = rows[0][name].to(device, dtype)
        return module
    for path, child in list(module.named_modules()):
        stacked = {
            name: _stack(f"{path}.{name}", weight, rows).to(device, dtype)
            for name, weight in child.named_parameters(recurse=False)
        }
        if isinstance(child, nn.Linear):
            module.set_submodule(path, RowLinear(stacked["weight"], stacked.get("bias")))
        elif isinstance(child, nn.RMSNorm):
            module.set_submodule(path, RowNorm(stacked["weight"], child.eps))
        elif set(stacked) == {"weight"} and stacked["weight"].ndim == 2:
            # decoder.Norm: it multiplies by its weight, which [B, 1, D] broadcasts to rows.
            child.weight = nn.Parameter(stacked["weight"].unsqueeze(1), requires_grad=False)
        elif stacked:
            raise InputError(
                f"{path}: expected matrices and norms, got {type(child).__name__}. Fix: use "
                "carry-ons of this kind one at a time"
            )
    return module


def _stack(name: str, like: Tensor, rows: Sequence[Mapping[str, Tensor] | None]) -> Tensor:
    """Return the weights `name` of all rows, [B, ...], in the dtype they are kept in."""
    kept = next((row[name].dtype for row in rows if row is not None), like.dtype)
    zeros = torch.zeros(like.shape, dtype=kept)
    return torch.stack([zeros if row is None else row[name] for row in rows])
