"""The learning rate of a step: a pure function of the step and the settings, without state."""

import math

from carryon.train.config import OptimizationSettings


def learning_rate(step: int, *, num_steps: int, settings: OptimizationSettings) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `num_steps` steps.

    The warm-up is linear and reaches the peak on its last step. Every schedule but `constant`
    reaches `min_lr_ratio` on the last step.
    """
    assert settings.learning_rate > 0, "expected resolved settings"
    warmup_steps = round(settings.warmup_ratio * num_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "wsd":
        decay_from = num_steps - round(settings.decay_ratio * num_steps)
        if step < decay_from:
            return settings.learning_rate
        return decayed_rate(progress(step, first=decay_from, num_steps=num_steps), settings)
    passed = progress(step, first=warmup_steps, num_steps=num_steps)
    if settings.schedule == "knee":
        passed = max(0.0, passed - settings.explore_ratio) / (1 - settings.explore_ratio)
    return decayed_rate(passed, settings)


def decayed_rate(passed: float, settings: OptimizationSettings) -> float:
    """Return the learning rate at the fraction `passed` of a decay from the peak to the minimum.

    `cosine` follows a half cosine, `multistep` drops by equal factors after 80 % and 90 %, the
    others are linear. At 1 it is the minimum exactly.
    """
    top, bottom = settings.learning_rate, settings.learning_rate * settings.min_lr_ratio
    if settings.schedule == "multistep":
        if passed <= 0.8:
            return top
        return top * math.sqrt(settings.min_lr_ratio) if passed <= 0.9 else bottom
    if settings.schedule == "cosine":
        return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * passed))
    return bottom + (top - bottom) * (1 - passed)


def progress(step: int, *, first: int, num_steps: int) -> float:
    """Return the fraction of steps `first` to `num_steps` done after `step`: 1 on the last."""
    return min(1.0, (step - first + 1) / max(1, num_steps - first))
