"""`carryon verify`: check a store, carry-on, run, sweep or lineage against its digests."""

import logging
from typing import Literal

from carryon.cache.errors import InputError
from carryon.tools.cli.output import print_result

logger = logging.getLogger(__name__)

Depth = Literal["quick", "sample", "full"]


def verify(folder: str, /, *, quick: bool = False, full: bool = False) -> int:
    """Check a store, carry-on, run, sweep or lineage against its digests.

    Of a store this by default compares the SHA-256 of all small files and the size of all others,
    decodes a sample of the chunks, and checks by the probe that hidden states, norm and LM head
    belong together. Of a carry-on, run, sweep or lineage it always reads every file, and lists
    those that it does not know. Nothing is changed. Exit code: 0 if the store is complete or
    the folder sound, else 1. The last line on stdout is a JSON line.

    Example:
        carryon verify store --full

    Args:
        folder: Folder of a store, carry-on, run, sweep or lineage.
        quick: Compare sizes only.
        full: Read every byte and compare its SHA-256.
    """
    if quick and full:
        raise InputError("--quick, --full: expected one of them, got both")
    from carryon.train.verify import folder_kind

    depth: Depth = "full" if full else "quick" if quick else "sample"
    if folder_kind(folder) == "store":
        return _verify_store(folder, depth=depth)
    return _verify_other(folder, depth=depth)


def _verify_other(folder: str, *, depth: Depth) -> int:
    from carryon.train.verify import verify_folder

    report = verify_folder(folder, depth=depth)
    for problem in report.problems:
        logger.error(f"damaged: {problem.path}: {problem.text}")
    for name in report.unknown:
        logger.warning(f"unknown: {name!a}: no file of a {report.kind}; nothing reads it")
    if report.without_digest:
        logger.warning(
            f"{len(report.without_digest)} files from before digests were recorded, the first is "
            f"{report.without_digest[0]}: a change of them may go unnoticed"
        )
    if report.is_sound:
        logger.info(f"OK: {folder}: a {report.kind}, {report.num_files:,} files checked")
    print_result(report.to_dict())
    return 0 if report.is_sound else 1


def _verify_store(store: str, *, depth: Depth) -> int:
    from carryon.cache.store.verify import verify as verify_store

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
        more = "" if depth == "full" else " (--full checks every byte)"
        logger.info(f"OK: {store}: {report.num_files:,} files checked{more}")
    print_result(report.to_dict())
    return 0 if report.is_complete else 1
