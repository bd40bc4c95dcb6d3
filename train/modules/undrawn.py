"""Building a module whose weights are loaded afterwards, without drawing random ones first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_DRAWS = {
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
}


class Undrawn(TorchFunctionMode):
    """Fills parameters with zeros where a module would fill them with random numbers.

    Drawing takes longer than reading the weights from the disk. Other tensors are drawn: of those
    not all are loaded. Only for modules that compute nothing from the parameters that they draw.
    """

    def __torch_function__(  # noqa: D105, PLW3201
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        named = kwargs or {}
        if getattr(function, "__name__", "") in _DRAWS:
            filled = args[0] if args else named.get("tensor")
            if isinstance(filled, nn.Parameter):
                with torch.no_grad():  # finite: some modules check how they start
                    return filled.zero_()
        return function(*args, **named)
