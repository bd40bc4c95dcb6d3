"""Alpha after training: the strengths to try, and what they gave as a picture.

What each strength gives is measured by carryon.train.inference.evaluate, in one pass over a store.
"""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.plots import NLL_LABEL, Line, draw, lines

MOST_ALPHAS = 1000
"""Strengths in one pass, at most; more are a slip of the keyboard."""


def parse_alphas(text: str) -> list[float]:
    """Return the strengths that `text` names: one number, or FIRST:LAST:STEP, both ends included.

    Example: `0:1.5:0.1` gives 0, 0.1, ..., 1.5; the empty text gives none.

    Raises:
        InputError: it is neither, or the steps do not lead from the first to the last.
    """
    if not text:
        return []
    try:
        numbers = [Decimal(part) for part in text.split(":")]  # 0.1 is exact: 0.3, not 0.30...04
    except InvalidOperation as error:
        raise _not_alphas(text) from error
    if not all(number.is_finite() for number in numbers):
        raise _not_alphas(text)
    if len(numbers) == 1:
        return [float(numbers[0])]
    if len(numbers) != 3:
        raise _not_alphas(text)
    first, last, step = numbers
    if step <= 0 or last < first or (last - first) / step >= MOST_ALPHAS:
        raise _not_alphas(text)
    return [float(first + step * index) for index in range(int((last - first) / step) + 1)]


def plot_alphas(
    alphas: Sequence[float], nlls: Sequence[float], base_nll: float, path: Path
) -> bool:
    """Draw the NLL against alpha, and the base's as a level, to the PNG `path`."""
    best = min(range(len(nlls)), key=lambda index: nlls[index])
    best_label = f"best: {nlls[best]:.4f} at alpha {alphas[best]:g}"
    series = [
        Line(xs=alphas, ys=nlls, label="base + alpha * carry-on"),
        Line(xs=[alphas[best]], ys=[nlls[best]], label=best_label),
    ]
    levels = {f"base: {base_nll:.4f}": base_nll}
    style: dict[str, Any] = {"x_label": "alpha", "y_label": NLL_LABEL, "levels": levels}
    return draw(path, lambda axes: lines(axes, series, **style))


def _not_alphas(text: str) -> InputError:
    return InputError(
        f"alpha: expected a number, or FIRST:LAST:STEP such as 0:1.5:0.1, got {text!r}"
    )
