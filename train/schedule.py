"""The learning rate of a step: a pure function of the step and the settings, without state."""

import math

from carryon.train.config import OptimizationSettings


def learning_rate(step: int, *, num_steps: int, settings: OptimizationSettings) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `num_steps` steps.

    The warm-up rises in equal parts and reaches the top on its last step; `cosine` and `wsd` reach
    `final_share` on the last step.
    """
    warmup_steps = round(settings.warmup_share * num_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    top, bottom = settings.learning_rate, settings.learning_rate * settings.final_share
    if settings.schedule == "constant":
        return top
    if settings.schedule == "cosine":
        passed = _part_done(step, first=warmup_steps, num_steps=num_steps)
        return bottom + (top - bottom) * 0.5 * (1 + math.cos(math.pi * passed))
    decay_from = num_steps - round(settings.decay_share * num_steps)
    if step < decay_from:
        return top
    return top + (bottom - top) * _part_done(step, first=decay_from, num_steps=num_steps)


def _part_done(step: int, *, first: int, num_steps: int) -> float:
    # 1/n on the first of n steps, 1 on the last.
    return min(1.0, (step - first + 1) / max(1, num_steps - first))
