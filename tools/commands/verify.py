"""`carryon verify`: a store against its own receipts."""

import json
import logging
from pathlib import Path
from typing import Literal

from carryon.cache.errors import InputError

logger = logging.getLogger(__name__)


def verify(store: str, /, *, quick: bool = False, full: bool = False) -> int:
    """Check a store against its own receipts, and say what is damaged or missing, and where.

    By default everything small is compared with its SHA-256, every file with its recorded size,
    a sample of the chunks is decoded, and the probe is checked: whether hidden states, norm and
    head belong together. Nothing is changed. Exit code 0: whole; 1: something is damaged or
    missing. The last line on stdout is a JSON line.

    Example:
        carryon verify store --full

    Args:
        store: Folder of the store.
        quick: Compare sizes only; a second for thousands of units.
        full: Read every byte and compare its SHA-256.
    """
    if quick and full:
        raise InputError("--quick and --full exclude each other: give one of them")
    from carryon.cache.store.verify import verify as verify_store

    depth: Literal["quick", "sample", "full"] = "full" if full else "quick" if quick else "sample"
    report = verify_store(Path(store), depth=depth)
    missing = [problem for problem in report.problems if problem.is_missing_unit]
    for problem in report.problems:
        if not problem.is_missing_unit:
            where = "plan" if problem.unit is None else f"unit {problem.unit}"
            logger.error(f"damaged: {where}: {problem.path}: {problem.text}")
    if missing:
        logger.error(
            f"missing: {len(missing)} units, the first is {missing[0].unit}: run the same "
            "carryon extract again, or carryon repair"
        )
    if not report.is_sound:
        logger.error(f"mend it with: carryon repair {store}")
    if report.is_complete:
        logger.info(f"{store}: whole ({depth}: {report.num_files:,} files)")
    print(json.dumps(report.to_dict()))
    return 0 if report.is_complete else 1
