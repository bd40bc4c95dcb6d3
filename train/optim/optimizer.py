"""The optimizer of a run: AdamW or Muon, whole or in parts that move during the backward pass."""

from collections.abc import Sequence
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

    With `in_backward` each moves its weights as soon as their gradients are known.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], *, in_backward: bool) -> None:
        """Join `parts`; with `in_backward` each of them has a single weight."""
        self.parts = list(parts)
        self.in_backward = in_backward
        self._clip: float | None = None  # None: gradients stay where they are
        self._squares: list[Tensor] = []
        super().__init__([], {})
        self.param_groups = [group for part in parts for group in part.param_groups]
        if in_backward:
            for part in parts:
                (weight,) = part.param_groups[0]["params"]
                weight.register_post_accumulate_grad_hook(self._hook(part))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Move every weight that still has a gradient."""
        assert closure is None
        for part in self.parts:
            part.step()

    def backward_and_move(self, mean: Tensor, *, max_norm: float) -> list[Tensor]:
        """Run the backward pass of `mean`, moving each weight; returns squares of their norms.

        A gradient whose norm is above `max_norm` is scaled down to it.
        """
        self._clip, self._squares = max_norm, []
        try:
            torch.autograd.backward(mean)
        finally:
            self._clip = None
        return_small_memory()
        return self._squares

    def _hook(self, part: torch.optim.Optimizer) -> Any:  # noqa: ANN401
        def move(weight: Tensor) -> None:
            if self._clip is None or weight.grad is None:
                return
            norm = nn.utils.clip_grad_norm_([weight], self._clip)
            if not bool(torch.isfinite(norm)):
                self._squares.append(norm.square())
                return  # not moved; the step says so at its end
            self._squares.append(norm.square())
            part.step()
            weight.grad = None

        return move

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts, their weights counted on."""
        state: dict[int, Any] = {}
        groups: list[Any] = []
        first = 0
        for part in self.parts:
            document = part.state_dict()
            state |= {first + index: values for index, values in document["state"].items()}
            groups += document["param_groups"]
            first += _num_weights(part)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each part its own state."""
        first = 0
        for part in self.parts:
            count = _num_weights(part)
            state = {
                index - first: values
                for index, values in state_dict["state"].items()
                if first <= index < first + count
            }
            part.load_state_dict(
                {"state": state, "param_groups": part.state_dict()["param_groups"]}
            )
            first += count
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(
    carryon: CarryOn, settings: OptimizationSettings, memory: MemorySettings
) -> torch.optim.Optimizer:
    """Return the optimizer of the carry-on's weights; only matrices decay.

    Raises:
        InputError: Muon with weights or state in few bits.
    """
    is_lean = memory.weights_dtype == "bfloat16" or memory.optimizer_bits == 8
    if settings.optimizer == "muon":
        if is_lean or memory.step_in_backward:
            raise InputError(
                "optimizer: expected adamw with weights_dtype bfloat16, optimizer_bits 8 or "
                "step_in_backward, got muon"
            )
        blocks = [
            weight
            for weight in _body(carryon).parameters()
            if weight.ndim == 2 and weight.requires_grad
        ]
        rest = [weight for weight in _trained(carryon) if not _is_among(weight, blocks)]
        muon = torch.optim.Muon(
            blocks,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that the learning rate suits both
        )
        return CompositeOptimizer([muon, _adamw(rest, settings, memory)], in_backward=False)
    weights = _trained(carryon)
    if memory.step_in_backward:
        parts = [
            _adamw([weight], settings, memory, first_index=index)
            for index, weight in enumerate(weights)
        ]
        return CompositeOptimizer(parts, in_backward=True)
    return _adamw(weights, settings, memory)


def _trained(carryon: CarryOn) -> list[Tensor]:
    return [weight for weight in carryon.parameters() if weight.requires_grad]


def _adamw(
    weights: Sequence[Tensor],
    settings: OptimizationSettings,
    memory: MemorySettings,
    *,
    first_index: int = 0,
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim >= 2]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (settings.beta1, settings.beta2)
    if memory.weights_dtype == "float32" and memory.optimizer_bits == 32:
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return LowBitAdamW(
        groups,
        lr=settings.learning_rate,
        betas=betas,
        weight_decay=settings.weight_decay,
        bits=memory.optimizer_bits,
        seed=settings.seed,
        first_index=first_index,
    )


def apply_memory_settings(carryon: CarryOn, memory: MemorySettings) -> CarryOn:
    """Give the weights the type of the settings, and let the body recompute if they say so."""
    if memory.weights_dtype == "bfloat16":
        for weight in carryon.parameters():
            weight.data = weight.data.bfloat16()
        device = next(carryon.parameters()).device
        is_emulated = device.type == "cpu" and not multiplies_bfloat16(device)
        for module in carryon.modules():
            if is_emulated and isinstance(module, Product):
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

    # As `activation_checkpointing_enable` does, which needs input embeddings.
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
    """Return the decoder blocks; a module of another kind as a whole."""
    body: nn.Module = getattr(carryon, "body", carryon)
    return body


def _num_weights(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _is_among(weight: Tensor, others: Sequence[Tensor]) -> bool:
    return any(weight is other for other in others)
