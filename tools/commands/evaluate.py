"""`carryon evaluate`: held-out loss of base and carry-on, from a store."""

import logging
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.tools.cli.output import print_result
from carryon.tools.cli.places import check_page
from carryon.tools.cli.table import format_table
from carryon.train.config import LossSettings

logger = logging.getLogger(__name__)

MAX_ALPHAS = 1000
"""Maximum number of strengths; more are a typing error."""


def evaluate(
    *,
    store: str,
    carryon: str,
    mix: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    samples: Literal["auto", "held-out", "all"] = "auto",
    alpha: str = "",
    write_alpha: bool = False,
    plot: str = "",
    device: str = "auto",
    loss: LossSettings,
) -> dict[str, Any]:
    """Measure the held-out loss of base and carry-on on a store.

    The loss is the mean negative log-likelihood (NLL) of a supervised token, in nats, with a
    standard error clustered by sample. The base itself is not needed. Of several alphas the best
    is chosen on one half of the samples and measured on the other half. The last line on stdout
    is a JSON line.

    Example:
        carryon evaluate --store store --carryon run/carryon --alpha 0:1.5:0.1

    Args:
        store: Folder of the store.
        carryon: Folder of the carry-on, or its id on the hub.
        mix: Stores of the other bases that the gate of the carry-on was trained with, each aligned
            to --store. Empty: a carry-on of one base.
        samples: Samples to measure on: `held-out` from training, or `all`. `auto`: the held-out
            ones of a store that the carry-on was trained on, all of another store.
        alpha: Strength of the correction: 0 is the base, 1 the carry-on as trained. One number,
            or several as FIRST:LAST:STEP. Empty: the alpha in the carry-on's card.
        write_alpha: Write the best alpha into the carry-on's card, as the new default.
        plot: PNG to plot the NLL against alpha. Empty: no plot.
        device: `auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ...
        loss: LM-head loss.
    """
    from carryon.train.inference.evaluate import evaluate as evaluate_carryon
    from carryon.train.inference.evaluate import plot_alphas
    from carryon.train.mixing.mixture_nll import mixture_rows
    from carryon.train.modules.serialization import write_alpha as write_to_folder
    from carryon.train.trainer.held_out.nll import shown_nll

    alphas = parse_alphas(alpha)
    if plot and len(alphas) < 2:
        raise InputError("--plot: expected several strengths, such as --alpha 0:1.5:0.1, got one")
    if plot:
        check_page(plot, name="--plot")
    if write_alpha and not Path(carryon).is_dir():
        raise InputError(f"--write-alpha: expected a folder as --carryon, got {carryon}")
    report = evaluate_carryon(
        store,
        carryon=carryon,
        mix=mix,
        samples=samples,
        alphas=alphas,
        device=device,
        loss=loss,
    )
    if choice := report.choice:
        for each, nll, se in zip(choice.alphas, choice.nlls, choice.nll_ses, strict=True):
            logger.info(f"alpha {each:<6g} NLL {shown_nll(nll, se)}")
        logger.info(
            f"best alpha {report.alpha:g}, chosen on {choice.num_targets:,} targets of "
            f"{choice.num_samples:,} samples; the loss is measured on the other samples"
        )
        if plot:
            plot_alphas(choice, Path(plot))
    if write_alpha:
        write_to_folder(carryon, report.alpha)
    if report.mixture:
        rows = mixture_rows(report.base_nll, report.carryon_nll, report.mixture)
        logger.info(format_table(rows))
    what = "mixture" if report.mixture else "carry-on"
    return print_result(
        report.to_dict(),
        f"{report.num_targets:,} targets of {report.num_samples:,} samples ({report.samples}): NLL "
        f"of the base {shown_nll(report.base_nll, report.base_nll_se)}, with the {what} "
        f"{shown_nll(report.carryon_nll, report.carryon_nll_se)} (alpha {report.alpha:g})",
    )


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
