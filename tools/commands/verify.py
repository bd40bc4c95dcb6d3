"""`carryon verify`: check a store against its receipts."""

import logging
from typing import Literal

from carryon.cache.errors import InputError
from carryon.tools.cli.output import print_result

logger = logging.getLogger(__name__)


def verify(store: str, /, *, quick: bool = False, full: bool = False) -> int:
    """Check a store and list what is damaged or missing.

    By default this compares the SHA-256 of all small files and the size of all others, decodes a
    sample of the chunks, and checks by the probe that hidden states, norm and LM head belong
    together. Nothing is changed. Exit code: 0 if the store is complete, else 1. The last line on
    stdout is a JSON line.

    Example:
        carryon verify store --full

    Args:
        store: Folder of the store.
        quick: Compare sizes only.
        full: Read every byte and compare its SHA-256.
    """
    if quick and full:
        raise InputError("--quick, --full: expected one of them, got both")
    from carryon.cache.store.verify import verify as verify_store

    depth: Literal["quick", "sample", "full"] = "full" if full else "quick" if quick else "sample"
    report = verify_store(store, depth=depth)
    missing = [problem for problem in report.problems if problem.is_missing_unit]
    for problem in report.problems:
        if not problem.is_missing_unit:
            where = "plan" if problem.unit is None else f"unit {problem.unit}"
            logger.error(f"damaged: {where}: {problem.path}: {problem.text}")
    if missing:
        logger.error(f"missing: {len(missing)} units, the first is unit {missing[0].unit}")
    if not report.is_sound:
        logger.error(f"Fix: carryon repair {store}")
    elif missing:
        logger.error("Fix: run the same carryon extract again")
    if report.is_complete:
        more = "" if full else " (--full checks every byte)"
        logger.info(f"OK: {store}: {report.num_files:,} files checked{more}")
    print_result(report.to_dict())
    return 0 if report.is_complete else 1
