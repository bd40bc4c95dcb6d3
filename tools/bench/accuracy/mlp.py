"""`cot-mlp`: a bottleneck without attention, to see what attention is for.

It is trained as the kind `mlp`, and written once more as a bottleneck whose attention gives zero,
which every program reads.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carryon.tools.bench.accuracy.plan import MLP, READABLE
from carryon.tools.cli.output import print_result
from carryon.train.config import CarryOnSettings, TrainSettings
from carryon.train.kinds import KINDS, Kind, register_kind
from carryon.train.modules.bottleneck import Bottleneck

_ATTENTION = ".self_attn."


class NoAttention(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, x: Tensor, attend: Any) -> Tensor:  # noqa: ANN401, ARG002 -- as Attention
        """Return zeros of the shape of `x`."""
        return torch.zeros_like(x)


def build_mlp(settings: CarryOnSettings, *, base_width: int) -> Bottleneck:
    """Return an untrained bottleneck of gated MLPs, each token by itself."""
    module = Bottleneck(settings, base_width=base_width)
    for layer in module.body.layers:
        layer.self_attn = NoAttention()
        layer.input_layernorm.requires_grad_(False)  # of the attention
    return module


def register_mlp() -> None:
    """Make the kind known to this process; it may be called again."""
    if MLP not in KINDS:
        register_kind(MLP, Kind(build=build_mlp, learning_rates=(3e-3, 1e-3)))


def train_mlp(*, store: str, out: str, settings: TrainSettings) -> dict[str, Any]:
    """Train an MLP without attention from a store; a step of experiment-cot.

    OUT/as-bottleneck holds it for `carryon generate` and `score`. The same command resumes.

    Example:
        python -m carryon.tools.bench cot-mlp --store store --out run --taps final layer.20

    Args:
        store: Folder of the store.
        out: Folder of the run.
        settings: As of carryon train; the kind is `mlp`.
    """
    from carryon.train.modules.serialization import load_carryon, save_carryon
    from carryon.train.trainer.trainer import train

    register_mlp()
    report = train(store, out=out, settings=settings.with_options(kind=MLP))
    module, card = load_carryon(report.carryon)
    shape = CarryOnSettings.from_dict(card.settings | {"kind": "bottleneck"})
    same = Bottleneck(shape, base_width=card.base_width)
    weights = same.state_dict()
    weights |= {name: torch.zeros_like(weights[name]) for name in weights if _ATTENTION in name}
    same.load_state_dict(weights | module.state_dict())
    folder = Path(out) / READABLE
    dtype = getattr(torch, settings.run.saved_dtype)
    save_carryon(folder, same, replace(card, settings=shape.to_dict()), dtype=dtype)
    return print_result({**report.to_dict(), "readable": str(folder)}, report.summary())
