"""Alpha after training: parse the strengths to try, and plot their losses."""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.inference.evaluate import AlphaChoice
from carryon.train.plots import NLL_LABEL, Line, draw, lines

MAX_ALPHAS = 1000
"""Maximum number of strengths; more are a typing error."""


def parse_alphas(text: str) -> list[float]:
    """Return the strengths that `text` names: one number, or FIRST:LAST:STEP, both ends included.

    Example: `0:1.5:0.1` gives 0, 0.1, ..., 1.5; the empty text gives none.

    Raises:
        InputError: it is neither, or the steps do not lead from the first to the last.
    """
    wrong = InputError(
        f"alpha: expected a number, or FIRST:LAST:STEP such as 0:1.5:0.1, got {text!r}"
    )
    try:
        # Decimals are exact: 0.3, not 0.30000000000000004
        numbers = [Decimal(part) for part in text.split(":")] if text else []
    except InvalidOperation as error:
        raise wrong from error
    if not all(number.is_finite() for number in numbers) or len(numbers) not in (0, 1, 3):
        raise wrong
    if len(numbers) < 3:
        return [float(number) for number in numbers]
    first, last, step = numbers
    if step <= 0 or last < first or (last - first) / step >= MAX_ALPHAS:
        raise wrong
    return [float(first + step * index) for index in range(int((last - first) / step) + 1)]


def plot_alphas(choice: AlphaChoice, path: Path) -> bool:
    """Draw the loss against alpha, and the base's as a level; return whether it was drawn."""
    best, alpha = min(zip(choice.nlls, choice.alphas, strict=True))
    series = [
        Line(xs=choice.alphas, ys=choice.nlls, label="base + alpha * carry-on"),
        Line(xs=[alpha], ys=[best], label=f"best: {best:.4f} at alpha {alpha:g}"),
    ]
    levels = {f"base: {choice.base_nll:.4f}": choice.base_nll}
    style: dict[str, Any] = {"x_label": "alpha", "y_label": NLL_LABEL, "levels": levels}
    return draw(path, lambda axes: lines(axes, series, **style))
