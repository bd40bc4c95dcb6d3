"""`carryon repair`: damaged or missing parts of a store, made again."""

import json
import logging

from carryon.cache.settings import ForwardSettings

logger = logging.getLogger(__name__)


def repair(store: str, /, *, base: str = "", forward: ForwardSettings) -> int:
    """Make damaged or missing parts of a store again, and nothing else.

    The store is verified in full first. Hidden states are computed again from the tokens in the
    store, so the corpus is not needed; the base is loaded only if states or its head are damaged.
    Exit code 0: whole now. The last line on stdout is a JSON line.

    Example:
        carryon repair store --base HuggingFaceTB/SmolLM2-135M-Instruct

    Args:
        store: Folder of the store.
        base: The base that made the store, if it is not where it was: hub id, folder or .gguf.
        forward: How the base is run; dtype and attention are taken from the store.
    """
    from carryon.cache.extraction.repair import repair as repair_store

    report = repair_store(store, base=base or None, forward=forward)
    state = "whole" if report.is_complete else "still damaged"
    logger.info(
        f"{store}: {len(report.problems)} problems, {len(report.restored_files)} files restored, "
        f"{len(report.computed_units)} units computed again: {state}"
    )
    print(json.dumps(report.to_dict()))
    return 0 if report.is_complete else 1
