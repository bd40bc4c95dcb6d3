"""`carryon export`: the hidden states of a store in the layout of another project."""

from dataclasses import asdict
from typing import Any, Literal

from carryon.tools.cli.output import print_result


def export_states(
    layout: Literal["speculators"],
    store: str,
    /,
    *,
    out: str,
    taps: list[str] = [],  # noqa: B006 -- read, never changed
) -> dict[str, Any]:
    """Write the hidden states of a store as files that speculators reads.

    A data set with token ids and loss masks, and one safetensors file a sample in
    `hidden_states`: the store's layers in ascending order, then prenorm. After an interruption
    the same command resumes. `carryon import vllm` makes a store of it again, to the same bits.
    The last line on stdout is a JSON line.

    Example:
        carryon export speculators store --out data

    Args:
        layout: Layout of the files.
        store: Folder of a finished store with the tap prenorm; FOLDER#2 for its second part.
        out: A new folder, or that of an interrupted export.
        taps: Hidden states to write, prenorm among them. Empty: all of the store but final.
    """
    from carryon.cache.exchange.exporting import export_speculators

    report = export_speculators(store, out=out, taps=taps)
    return print_result(
        asdict(report),
        f"{report.folder}: {report.num_samples:,} samples, {report.num_tokens:,} tokens, layers "
        f"{' '.join(map(str, report.layer_ids))}; {report.written_bytes / 1e6:,.1f} MB in "
        f"{report.written_files:,} files written now in {report.elapsed_s:,.0f} s",
    )
