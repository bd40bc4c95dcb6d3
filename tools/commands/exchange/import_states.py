"""`carryon import`: hidden states that inference nodes wrote to files, as a store."""

import logging
from dataclasses import asdict
from typing import Any, Literal

from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings
from carryon.tools.cli.output import print_result
from carryon.tools.cli.sizes import parse_bytes

logger = logging.getLogger(__name__)


def import_states(
    source: Literal["vllm"],
    folder: str,
    /,
    *,
    base: str,
    out: str,
    data: list[str] = [],  # noqa: B006 -- read, never changed
    states: str = "",
    append: bool = False,
    drop_missing: bool = False,
    max_disk: str = "",
    imports: ImportSettings,
    corpus: CorpusSettings,
    forward: ForwardSettings,
    data_settings: DataSettings,
) -> dict[str, Any]:
    """Pack hidden states that vLLM wrote to files into a store.

    The folder holds one safetensors file a request, as vLLM's hidden states connector writes
    them, or a data set of speculators with its files in `hidden_states`. The base runs over eight
    samples only, to check that the states are its own and of the layers that --layer-ids names.
    Wrong, cut off and missing files are errors that name the file. After an interruption the same
    command resumes. The store is like any other; the last line on stdout is a JSON line.

    Example:
        carryon import vllm states --base BASE --layer-ids 2 15 30 --out store

    Args:
        source: What wrote the files; `vllm` also for the layout of speculators.
        folder: Folder with the files, or with the data set.
        base: The base that computed the states: hub id, folder or .gguf file.
        out: Folder of the store, created if missing. An existing store is resumed.
        data: The corpus that the nodes were given, as for carryon extract: token ids are compared,
            and samples, masks and ids are its own. Empty: those of the data set, or every token a
            target.
        states: Folder of a data set's files, where it is not its `hidden_states`.
        append: Add the samples of the files to a finished store; its units stay as they are.
        drop_missing: Leave out, and count, samples of the data or data set without a file.
        max_disk: Stop before the store exceeds this size, such as 500MB or 20GB; with a higher
            limit the same command resumes. Empty: no limit.
        imports: What the files hold.
        corpus: How --data become samples.
        forward: How the base is run for the check.
        data_settings: How --data are read.
    """
    max_disk_bytes = parse_bytes("--max-disk", max_disk) if max_disk else None
    from carryon.cache.exchange.importing import plan_import, run_import

    plan = plan_import(
        folder,
        base=base,
        out=out,
        data=data,
        states=states or None,
        drop_missing=drop_missing,
        imports=imports,
        corpus=corpus,
        forward=forward,
        data_settings=data_settings,
    )
    report = run_import(plan, append=append, max_disk_bytes=max_disk_bytes)
    if not report.is_finished:
        logger.warning(f"stopped at --max-disk {max_disk}. Fix: raise it to resume")
    return print_result(
        asdict(report),
        f"{report.store}: {report.num_tokens:,} tokens in {report.num_units:,} units, "
        f"{report.imported_tokens:,} imported now from {report.imported_files:,} files in "
        f"{report.elapsed_s:,.0f} s; {report.stored_bytes / 1e6:,.1f} MB of "
        f"{report.raw_bytes / 1e6:,.1f} MB raw",
    )
