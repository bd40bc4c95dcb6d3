"""`carryon inspect`: what is in a store, for people or as JSON."""

import json as json_format
from collections import Counter
from collections.abc import Iterable
from typing import Any

from carryon.tools.cli.table import format_table

LABELS = {
    "documents": "metadata",
    "head": "head and norm",
    "probe": "probe",
    "samples": "sample tables",
    "units": "receipts, copies",
}
"""What the sizes of small arrays are summed under, by the first part of their names."""


def inspect_store(store: str, /, *, json: bool = False) -> dict[str, Any]:
    """Show what a store holds, what made it, and how large each part is.

    Opening a store checks its documents and that states, norm and head belong together; nothing
    is changed. An unfinished store is shown with what it has so far. The states themselves are
    not read.

    Example:
        carryon inspect demo/store

    Args:
        store: Folder of the store.
        json: Print one JSON line instead of text.
    """
    from carryon.cache.store.reader import Store
    from carryon.tools.commands.store_facts import describe_store

    facts = describe_store(Store.open(store, allow_unfinished=True))
    print(json_format.dumps(facts) if json else format_facts(facts))
    return facts


def format_facts(facts: dict[str, Any]) -> str:
    """Return the facts of a store as text."""
    blocks = {
        "store": _store_rows(facts),
        "base": _base_rows(facts),
        "taps": _tap_rows(facts),
        "corpus": _corpus_rows(facts),
        "bytes": _size_rows(facts),
        "made with": facts["versions"].items(),
    }
    return "\n\n".join(_block(title, rows) for title, rows in blocks.items())


def _block(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    return f"{title}\n{format_table([(f'  {name}', str(value)) for name, value in rows])}"


def _store_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    units, finished = facts["units"], facts["finished_units"]
    state = "finished" if units == finished else "UNFINISHED: run the same carryon extract again"
    return [
        ("folder", facts["store"]),
        ("fingerprint", facts["fingerprint"]),
        ("units", f"{finished} of {units}, {facts['unit_tokens']:,} tokens each ({state})"),
        ("samples", f"{facts['samples']:,}, {facts['held_out_samples']:,} of them held out"),
        ("tokens", f"{facts['tokens']:,}, {facts['supervised_tokens']:,} of them supervised"),
        ("order seed", facts["seed"]),
    ]


def _base_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    base, forward = facts["base"], facts["forward"]
    return [
        ("id", base["id"]),
        ("revision", base["revision"] or "none (a local base)"),
        ("architecture", f"{base['architecture']}, {base['num_layers']} blocks"),
        ("width, vocabulary", f"{base['width']:,}, {base['vocab_size']:,}"),
        ("weights", f"sha256 {base['weights_sha256']}"),
        ("tokenizer", f"sha256 {base['tokenizer_sha256']}"),
        ("chat template", _digest(base["chat_template_sha256"])),
        ("computed in", f"{forward['compute_dtype']}, attention {forward['attention']}"),
    ]


def _tap_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [(tap, _norm_state(tap)) for tap in facts["taps"]]
    rows.append(("stored as", f"{facts['dtype']}, profile {facts['profile']}"))
    for tap, errors in facts["profile_error"].items():
        rows.append((f"error of {tap}", ", ".join(f"{k} {v:.3g}" for k, v in errors.items())))
    return rows


def _corpus_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [("file", f"{_file['name']}, {_file['bytes']:,} bytes") for _file in facts["files"]]
    rows += [(name.replace("_", " "), value) for name, value in facts["corpus"].items()]
    shown = ("samples", "tokens", "supervised_tokens")  # stand in the first block
    rows += [
        (name.replace("_", " "), f"{value:,}")
        for name, value in facts["counts"].items()
        if name not in shown and (value or name in ("records", "truncated"))
    ]
    return rows


def _size_rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    totals: Counter[str] = Counter()
    for name, size in facts["array_bytes"].items():
        totals[LABELS.get(name.partition("/")[0], name)] += size
    rows: list[tuple[str, Any]] = []
    for name, size in totals.items():
        ratio = facts["ratio_to_raw"].get(name.removeprefix("hidden/"))
        scales = " with its scales" if facts["profile"] != "exact" else ""
        note = f", {ratio:.3f} of raw {facts['dtype']}{scales}" if ratio else ""
        rows.append((name, f"{size:,}{note}"))
    return [*rows, ("all", f"{facts['bytes']:,}")]


def _norm_state(tap: str) -> str:
    if tap == "final":
        return "after the final norm: what the head reads"
    if tap == "prenorm":
        return "the residual stream before the final norm"
    return f"the residual stream after block {tap.removeprefix('layer.')}, not normed"


def _digest(value: str | None) -> str:
    return f"sha256 {value}" if value else "none"
