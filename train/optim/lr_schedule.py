"""The learning rate of a step: a pure function of the step and the settings, without state."""

import math

from carryon.train.config import OptimizationSettings


def learning_rate(step: int, *, num_steps: int, settings: OptimizationSettings) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `num_steps` steps.

    The warm-up rises in equal parts and reaches the top on its last step; all but `constant` reach
    `min_lr_ratio` on the last step.
    """
    assert settings.learning_rate > 0, "expected the settings of a run, which are resolved"
    warmup_steps = round(settings.warmup_ratio * num_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    if settings.schedule == "wsd":
        decay_from = num_steps - round(settings.decay_ratio * num_steps)
        if step < decay_from:
            return settings.learning_rate
        return falling_rate(part_done(step, first=decay_from, num_steps=num_steps), settings)
    passed = part_done(step, first=warmup_steps, num_steps=num_steps)
    if settings.schedule == "knee":
        explored = settings.explore_ratio
        passed = max(0.0, passed - explored) / (1 - explored)
    return falling_rate(passed, settings)


def falling_rate(passed: float, settings: OptimizationSettings) -> float:
    """Return the learning rate at the part `passed` of a fall from the top to the end.

    `cosine` falls as its name says, `multistep` at once by equal factors after 80 % and 90 %, the
    others in a straight line. At 1 it is the end exactly.
    """
    top, bottom = settings.learning_rate, settings.learning_rate * settings.min_lr_ratio
    if settings.schedule == "multistep":
        if passed <= 0.8:
            return top
        return top * math.sqrt(settings.min_lr_ratio) if passed <= 0.9 else bottom
    if settings.schedule == "cosine":
        return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * passed))
    return bottom + (top - bottom) * (1 - passed)


def part_done(step: int, *, first: int, num_steps: int) -> float:
    """Return the part of steps `first` to `num_steps` that is done after `step`: 1 on the last."""
    return min(1.0, (step - first + 1) / max(1, num_steps - first))
