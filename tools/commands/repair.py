"""`carryon repair`: restore damaged or missing parts of a store."""

from dataclasses import asdict

from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.output import print_result


def repair(store: str, /, *, base: str = "", forward: ForwardSettings) -> int:
    """Restore the damaged or missing parts of a store, and only these.

    The store is first verified in full. Hidden states are computed from the tokens in the store,
    so the corpus is not needed. The base is loaded only if states or its LM head are damaged.
    Exit code: 0 if the store is now complete, else 1. The last line on stdout is a JSON line.

    Example:
        carryon repair store --base HuggingFaceTB/SmolLM2-135M-Instruct

    Args:
        store: Folder of the store.
        base: The base that made the store, if it has moved: hub id, folder or .gguf file.
        forward: How the base is run; dtype and attention are those of the store.
    """
    from carryon.cache.extraction.repair import repair as repair_store

    report = repair_store(store, base=base or None, forward=forward)
    print_result(
        asdict(report),
        f"{'OK' if report.is_complete else 'STILL DAMAGED'}: {store}: {len(report.problems)} "
        f"problems, {len(report.restored_files)} files restored, {len(report.computed_units)} "
        "units computed",
    )
    return 0 if report.is_complete else 1
