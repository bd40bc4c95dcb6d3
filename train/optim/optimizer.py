"""The optimizer of a run, AdamW or Muon, and the memory settings of the weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.device import multiplies_bfloat16, return_small_memory
from carryon.cache.errors import InputError
from carryon.train.config import MemorySettings, OptimizationSettings
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.decoder import Decoder
from carryon.train.modules.linear import Product
from carryon.train.optim.lowbit_adamw import LowBitAdamW, PlainOptimizer


class CompositeOptimizer(PlainOptimizer):
    """Several optimizers, each of some weights, as one.

    With `in_backward` each has a single weight, and moves it when its gradient is complete.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], *, in_backward: bool) -> None:
        """Join `parts`: they share one state from here on."""
        super().__init__([], {})
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.parts = list(parts)
        self.in_backward = in_backward
        self._max_norm: float | None = None  # None: gradients stay where they are
        self._squares: list[Tensor] = []
        for part in parts:
            part.state = self.state
            if in_backward:
                (weight,) = part.param_groups[0]["params"]
                weight.register_post_accumulate_grad_hook(partial(self._move, part))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Move every weight that has a gradient."""
        assert closure is None
        for part in self.parts:
            part.step()

    def backward_and_move(self, mean: Tensor, *, max_norm: float) -> list[Tensor]:
        """Run the backward pass of `mean` and move each weight; return the squared gradient norms.

        A gradient of a larger norm than `max_norm` is scaled down to it. A weight whose gradient
        is not finite stays where it is, on a GPU only with a fused AdamW.
        """
        self._max_norm, self._squares = max_norm, []
        try:
            torch.autograd.backward(mean)
        finally:
            self._max_norm = None
        return_small_memory()
        return self._squares

    def _move(self, part: torch.optim.Optimizer, weight: Tensor) -> None:
        if self._max_norm is None or weight.grad is None:
            return
        norm = nn.utils.clip_grad_norm_([weight], self._max_norm)
        self._squares.append(norm.square())
        if norm.device.type == "cuda":  # which is not waited for
            skip_if_(part, ~torch.isfinite(norm))
        elif not bool(torch.isfinite(norm)):
            return
        part.step()
        weight.grad = None


def skip_if_(optimizer: torch.optim.Optimizer, is_skipped: Tensor) -> None:
    """Let the next step of every fused AdamW in `optimizer` change nothing if so; read nothing.

    Args:
        optimizer: of any kind; parts of another kind take the step.
        is_skipped: [] bool, on the device of the weights.
    """
    parts = optimizer.parts if isinstance(optimizer, CompositeOptimizer) else [optimizer]
    for part in parts:
        if isinstance(part, torch.optim.AdamW):
            # as GradScaler sets it; the kernel reads it on the device
            part.found_inf = is_skipped.float()  # type: ignore[attr-defined]


LR_FACTOR = "lr_factor"
"""In a group of weights: its learning rate as a multiple of the run's. Without it: 1."""


def build_optimizer(
    carryon: CarryOn,
    settings: OptimizationSettings,
    memory: MemorySettings,
    *,
    gate: nn.Module | None = None,
    gate_rate: float = 0.0,
) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable weights; only matrices decay.

    Args:
        carryon: whose weights are trained.
        settings: of the optimizer.
        memory: of the carry-on; a gate is small and stays in float32, with AdamW.
        gate: trained beside it. None: there is none.
        gate_rate: its peak learning rate.

    Raises:
        InputError: Muon with low-precision weights or state, or with step_in_backward.
    """
    parts = _carryon_parts(carryon, settings, memory)
    if gate is not None:
        parts += _gate_parts(gate, settings, memory, rate=gate_rate)
    if len(parts) == 1 and not memory.step_in_backward:
        return parts[0]
    return CompositeOptimizer(parts, in_backward=memory.step_in_backward)


def _carryon_parts(
    carryon: CarryOn, settings: OptimizationSettings, memory: MemorySettings
) -> list[torch.optim.Optimizer]:
    weights = [weight for weight in carryon.parameters() if weight.requires_grad]
    adamw = partial(_adamw, settings=settings, memory=memory)
    if not weights:  # of the kind `none`
        return []
    if settings.optimizer == "muon":
        if (
            memory.weights_dtype == "bfloat16"
            or memory.optimizer_bits == 8
            or (memory.step_in_backward)
        ):
            raise InputError(
                "optimizer: expected adamw with weights_dtype bfloat16, optimizer_bits 8 or "
                "step_in_backward, got muon"
            )
        in_body = {id(weight) for weight in _body(carryon).parameters() if weight.ndim == 2}
        muon = torch.optim.Muon(
            [weight for weight in weights if id(weight) in in_body],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that one learning rate suits both
        )
        rest = [weight for weight in weights if id(weight) not in in_body]
        return [muon, adamw(rest)]
    if memory.step_in_backward:
        return [adamw([weight], first_index=index) for index, weight in enumerate(weights)]
    return [adamw(weights)]


def _gate_parts(
    gate: nn.Module, settings: OptimizationSettings, memory: MemorySettings, *, rate: float
) -> list[torch.optim.Optimizer]:
    weights = list(gate.parameters())
    each = [[weight] for weight in weights] if memory.step_in_backward else [weights]
    parts = [_adamw(some, settings=settings, memory=MemorySettings()) for some in each]
    for group in (group for part in parts for group in part.param_groups):
        group[LR_FACTOR] = rate / settings.learning_rate
    return parts


def _adamw(
    weights: Sequence[Tensor],
    *,
    settings: OptimizationSettings,
    memory: MemorySettings,
    first_index: int = 0,
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim >= 2]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    make: Callable[..., torch.optim.Optimizer]
    if memory.weights_dtype == "float32" and memory.optimizer_bits == 32:
        make = partial(torch.optim.AdamW, fused=True)
    else:
        make = partial(
            LowBitAdamW, bits=memory.optimizer_bits, seed=settings.seed, first_index=first_index
        )
    return make(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )


def apply_memory_settings(carryon: CarryOn, memory: MemorySettings) -> CarryOn:
    """Give the weights the dtype of the settings, and make the blocks recompute if set.

    Raises:
        InputError: recompute, for a module without blocks that can.
    """
    if memory.weights_dtype == "bfloat16":
        for weight in carryon.parameters():
            weight.data = weight.data.bfloat16()
        device = next(carryon.parameters()).device
        if device.type == "cpu" and not multiplies_bfloat16(device):
            for module in carryon.modules():
                if isinstance(module, Product):
                    module.wide = torch.float32
    if memory.recompute:
        _recompute_blocks_(carryon)
    return carryon


def _recompute_blocks_(carryon: CarryOn) -> None:
    body = _body(carryon)
    if isinstance(body, Decoder):
        body.recompute = True
        return
    from torch.utils.checkpoint import checkpoint

    # As `gradient_checkpointing_enable` does, which needs input embeddings.
    layers: Any = [layer for layer in body.modules() if hasattr(layer, "gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    if not layers:
        raise InputError(
            f"recompute: expected blocks of transformers in {type(carryon).__name__}, found none. "
            "Fix: leave out --recompute"
        )


def _body(carryon: CarryOn) -> nn.Module:
    """Return the decoder blocks; of a module of another kind, all of it."""
    body: nn.Module = getattr(carryon, "body", carryon)
    return body
