"""`carryon evaluate`: held-out loss of base and carry-on, from a store."""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.train.config import LossSettings

logger = logging.getLogger(__name__)


def evaluate(
    *,
    store: str,
    carryon: str,
    samples: Literal["auto", "held-out", "all"] = "auto",
    alpha: str = "",
    write_alpha: bool = False,
    plot: str = "",
    device: str = "auto",
    loss: LossSettings,
) -> dict[str, Any]:
    """Measure base and carry-on on samples of a store; the base itself is not needed.

    The figure is the mean negative log-likelihood of a supervised token (NLL), in nats; lower is
    better, and its exponential is the perplexity. Many alphas are measured in one pass, in which
    the carry-on itself runs once, and the best is reported. The last line on stdout is a JSON
    line.

    Example:
        carryon evaluate --store store --carryon run/carryon --alpha 0:1.5:0.1

    Args:
        store: Folder of the store.
        carryon: Folder of the carry-on, or its id on the hub.
        samples: Samples to measure on: those `held-out` from training, or `all`. `auto` takes
            the held-out ones of the store it was trained on, and all of another store.
        alpha: Strength of the correction: 0 is the base, 1 what was trained. One number, or many
            as FIRST:LAST:STEP. Empty: as the carry-on's own file says.
        write_alpha: Write the best alpha into the carry-on's folder, to be used from then on.
        plot: PNG to draw the NLL against alpha to. Empty for none.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
        loss: How the frozen head is multiplied.
    """
    from carryon.train.inference.alpha import parse_alphas, plot_alphas
    from carryon.train.inference.evaluate import evaluate as evaluate_carryon
    from carryon.train.modules.serialization import write_alpha as write_to_folder

    if write_alpha and not Path(carryon).is_dir():
        raise InputError(f"--write-alpha: expected a folder as --carryon, got {carryon}")
    report = evaluate_carryon(
        store=store,
        carryon=carryon,
        samples=samples,
        alphas=parse_alphas(alpha),
        device=device,
        loss=loss,
    )
    if len(report.alphas) > 1:
        for each, nll in zip(report.alphas, report.carryon_nlls, strict=True):
            logger.info(f"alpha {each:<6g} NLL {nll:.4f}")
    logger.info(
        f"{report.num_targets:,} supervised tokens of {report.num_samples:,} samples "
        f"({report.samples}): NLL of the base {report.base_nll:.4f}, with the carry-on "
        f"{report.carryon_nll:.4f} ({'best ' if len(report.alphas) > 1 else ''}"
        f"alpha {report.alpha:g})"
    )
    if plot:
        plot_alphas(report.alphas, report.carryon_nlls, report.base_nll, Path(plot))
    if write_alpha:
        write_to_folder(carryon, report.alpha)
    print(json.dumps(report.to_dict()))
    return report.to_dict()
