"""`carryon evaluate`: held-out loss of base and carry-on, from a store."""

import json
import sys
from typing import Any, Literal

from carryon.train.config import LossSettings


def evaluate(
    *,
    store: str,
    carryon: str,
    samples: Literal["auto", "held-out", "all"] = "auto",
    alpha: float | None = None,
    device: str = "auto",
    loss: LossSettings,
) -> dict[str, Any]:
    """Measure base and carry-on on samples of a store; the base itself is not needed.

    The figure is the mean negative log-likelihood of a supervised token (NLL), in nats; lower is
    better, and its exponential is the perplexity. The last line on stdout is a JSON line.

    Example:
        carryon evaluate --store store --carryon run/carryon

    Args:
        store: Folder of the store.
        carryon: Folder of the carry-on.
        samples: Samples to measure on: those `held-out` from training, or `all`. `auto` takes
            the held-out ones of the store it was trained on, and all of another store.
        alpha: Strength of the correction: 0 is the base, 1 what was trained. Default: as the
            carry-on's own file says.
        device: `auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ...
        loss: How the frozen head is multiplied.
    """
    from carryon.train.evaluate import evaluate as evaluate_carryon

    report = evaluate_carryon(
        store=store, carryon=carryon, samples=samples, alpha=alpha, device=device, loss=loss
    )
    print(
        f"{report.num_targets:,} supervised tokens of {report.num_samples:,} samples "
        f"({report.samples}): NLL of the base {report.base_nll:.4f}, with the carry-on "
        f"{report.carryon_nll:.4f} (alpha {report.alpha:g})",
        file=sys.stderr,
    )
    print(json.dumps(report.to_dict()))
    return report.to_dict()
