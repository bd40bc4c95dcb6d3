"""Learning rates by kind: with what a carry-on is trained where nothing else is asked for.

They were found on one base (SmolLM2-135M). A rate is a matter of what is trained: a bottleneck
begins with nothing to lose, a `top` with the base's own weights.
"""

from dataclasses import replace

from carryon.train.config import CarryOnSettings, OptimizationSettings

RATES = {
    "bottleneck": (3e-3, 1e-3),
    "native": (1e-3, 3e-4),
    "top": (2e-4, 5e-4, 1e-3),
    "top by LoRA": (2e-3, 1e-3),
}
"""Highest learning rates that suit each kind: its own first, then others that are worth a try."""
WARN_ABOVE = 10.0
"""How many times its own rate wrecks a `top`."""


def rates_of(carryon: CarryOnSettings) -> tuple[float, ...]:
    """Return the learning rates that suit a carry-on, its own first."""
    return RATES["top by LoRA" if carryon.lora_rank else carryon.kind]


def with_own_rate(
    optimization: OptimizationSettings, carryon: CarryOnSettings
) -> OptimizationSettings:
    """Return the settings with the kind's own learning rate where none is given."""
    rate = optimization.learning_rate or rates_of(carryon)[0]
    return replace(optimization, learning_rate=rate)


def rate_warning(optimization: OptimizationSettings, carryon: CarryOnSettings) -> str:
    """Return what to say of a learning rate that wrecks a `top`; nothing of one that does not."""
    rate, own = optimization.learning_rate, rates_of(carryon)[0]
    if carryon.kind != "top" or rate <= WARN_ABOVE * own:
        return ""
    return (
        f"warning: learning_rate {rate:g} is {rate / own:.0f} times what suits a top"
        f"{' by LoRA' if carryon.lora_rank else ''} ({own:g}), which begins as the base itself and "
        "may be worse than it after a few steps: leave out --learning-rate, or lower it"
    )
