"""`carryon inspect`: the content of a store, for people or as JSON."""

import json as json_format
from collections import Counter
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.report import Report, format_report, merge_reports
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.tools.cli.output import visible
from carryon.tools.cli.table import format_table

if TYPE_CHECKING:
    from carryon.cache.format.manifest import Manifest
    from carryon.cache.store.reader import Store

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SMALL_ARRAYS = {
    "documents": "metadata",
    "head": "head and norm",
    "probe": "probe",
    "samples": "sample tables",
    "units": "receipts, copies",
}
"""First part of their names -> the row in which their sizes are summed."""


def inspect_store(
    store: str, /, *, json: bool = False, sample: str = "", base: str = "", html: str = ""
) -> dict[str, Any]:
    """Show what a store holds, how it was made, and its size by part.

    Opening a store checks its metadata, and that states, norm and LM head belong together. States
    are not read and nothing is changed. An unfinished store is shown as far as it is. With
    --sample it shows one sample as the model saw it, as carryon preview does.

    Example:
        carryon inspect demo/store

    Args:
        store: Folder of the store.
        json: Print one JSON line instead of text.
        sample: Id or number, counted from 0, of a sample to show.
        base: For --sample: the base, whose tokenizer is read: hub id, folder or .gguf file. Empty:
            where it was at extraction.
        html: For --sample: file for the same as a page of HTML. Empty: no file.
    """
    from carryon.cache.store.reader import Store

    opened = Store.open(store, allow_unfinished=True, allow_aligned=True)
    if sample:
        return _show_sample(opened, sample, base=base, html=html, is_json=json)
    if base or html:
        raise InputError("--base and --html: expected --sample beside them. Fix: --sample ID")
    facts = describe_store(opened)
    print(json_format.dumps(facts) if json else visible(format_facts(facts)))
    return facts


def _show_sample(
    store: "Store", name: str, *, base: str, html: str, is_json: bool
) -> dict[str, Any]:
    """Print a sample; return its facts."""
    from carryon.cache.base.facts import read_facts
    from carryon.cache.base.identity import digest_tokenizer
    from carryon.cache.base.recorded import recorded_source, tokenizer_of
    from carryon.cache.corpus.samples import Sample
    from carryon.tools.cli.places import check_page, write_page
    from carryon.tools.commands.pages.samples import make_sample_page
    from carryon.tools.commands.pages.shown_samples import index_of, print_samples, show_sample

    if html:
        check_page(html, name="--html")
    if alignment := store.manifest.alignment:
        raise InputError(
            f"--sample: expected a store of its own, got {store.name}, which holds the tokens of "
            f"{alignment['anchor_base']}. Fix: inspect the store that it is aligned to"
        )
    index, kinds = index_of(store, name), set()
    for part in store.manifest.parts:
        if part.first_sample <= index < part.first_sample + part.num_samples:
            kinds = set(part.kinds)
    identity = store.manifest.base
    facts = read_facts(
        base or recorded_source(identity, where=store.root), like=tokenizer_of(identity)
    )
    if digest_tokenizer(facts.tokenizer) != identity.get("tokenizer_sha256"):
        raise SettingMismatchError(
            f"{base or identity['id']}: expected the tokenizer that {store.root} was made with, "
            "got another. Fix: give its own base with --base"
        )
    stored = store.read_sample(index, taps=[])
    shown = show_sample(
        Sample(
            id=stored.id,
            tokens=stored.tokens,
            loss_mask=stored.loss_mask,
            char_end=stored.char_end,
            is_held_out=bool(store.sample_held_out[index]),
            role=int(store.sample_roles[index]),
        ),
        facts.tokenizer,
        kind=kinds.pop() if len(kinds) == 1 else "sample",
        where=f"{store.root}, number {index}",
        end_tokens=facts.end_tokens,
    )
    if html:
        page = make_sample_page([shown], title=f"Sample of {store.root}")
        write_page(html, page, name="--html")
    if is_json:
        print(json_format.dumps(shown.to_dict()))
    else:
        print_samples([shown])
    return shown.to_dict()


def describe_store(store: "Store") -> dict[str, Any]:
    """Return provenance, counts and bytes on disk of a store as plain JSON values."""
    manifest, is_finished = store.manifest, len(store.finished_units) == store.num_units
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
        kinds.update(part.kinds)
    sizes = _measure_arrays(store.root)
    finished = (store.receipt(unit).num_tokens for unit in store.finished_units)
    num_tokens = store.num_tokens if is_finished else sum(finished)
    raw_bytes = num_tokens * store.width * _ITEM_BYTES[manifest.settings["dtype"]]
    ratios = {}
    for tap in store.taps:  # scales are part of a lossy profile
        arrays = (f"hidden/{tap}", f"scale/token/{tap}", f"scale/channel/{tap}")
        stored_bytes = sum(sizes.get(name, 0) for name in arrays)
        ratios[tap] = round(stored_bytes / raw_bytes, 4) if raw_bytes else None
    return {
        "store": str(store.root),
        "fingerprint": store.fingerprint,
        "base": manifest.base,
        "forward": manifest.forward,
        "taps": store.taps,
        "width": store.width,
        "dtype": manifest.settings["dtype"],
        "profile": manifest.settings["profile"],
        "rounded_as": manifest.rounded_as,
        "profile_error": manifest.profile_error,
        "head": manifest.head,
        "seed": manifest.settings["seed"],
        "units": store.num_units,
        "finished_units": len(store.finished_units),
        "unit_tokens": manifest.unit_tokens,
        "samples": store.num_samples,
        "sample_groups": len(set(store.sample_groups.tolist())),
        "held_out_samples": int(store.sample_held_out.sum()),
        "tokens": store.num_tokens,
        "supervised_tokens": manifest.num_supervised,
        "corpus": manifest.corpus,
        "alignment": manifest.alignment,
        "counts": dict(counts),
        "kinds": dict(kinds),
        "report": _report(manifest),
        "files": [file for part in manifest.parts for file in part.files],
        "bytes": sum(sizes.values()),
        "array_bytes": sizes,
        "raw_bytes_per_tap": raw_bytes,
        "ratio_to_raw": ratios,
        "versions": manifest.versions,
    }


def _shown_groups(num_groups: int, num_samples: int) -> dict[str, str]:
    """Return a row where several samples are of one record or split group."""
    shown = f"{num_groups:,}: samples of one record or split group, held out together"
    return {"groups": shown} if num_groups < num_samples else {}


def _report(manifest: "Manifest") -> dict[str, Any]:
    """Return what became of the records of all parts; empty if no part says."""
    reports = [Report.from_dict(part.report) for part in manifest.parts if part.report]
    return merge_reports(reports).to_dict() if reports else {}


def _measure_arrays(root: Path) -> dict[str, int]:
    """Return the bytes of each array; `units` are receipts and copies, `documents` all else."""
    sizes: Counter[str] = Counter()
    for path in root.rglob("*"):
        if path.is_file():
            array, is_chunk, _ = path.relative_to(root).as_posix().partition("/c/")
            if array.startswith("units/"):
                array = "units"
            sizes[array if is_chunk or array == "units" else "documents"] += path.stat().st_size
    return dict(sorted(sizes.items()))


def format_facts(facts: dict[str, Any]) -> str:
    """Return the facts of a store as text."""
    is_finished = facts["units"] == facts["finished_units"]
    state = "finished" if is_finished else "UNFINISHED: run the same carryon extract again"
    errors = facts["profile_error"].items()
    blocks: dict[str, dict[str, Any]] = {
        "store": {
            "folder": facts["store"],
            "fingerprint": facts["fingerprint"],
            "units": f"{facts['finished_units']} of {facts['units']} ({state})",
            "tokens of a unit": facts["unit_tokens"],
            "samples": f"{facts['samples']:,}, {facts['held_out_samples']:,} of them held out",
            **_shown_groups(facts["sample_groups"], facts["samples"]),
            "tokens": f"{facts['tokens']:,}, {facts['supervised_tokens']:,} of them supervised",
            "order seed": facts["seed"],
        },
        "base": {"quantization": None} | facts["base"] | facts["forward"],
        "taps": {
            **{tap: _tap_meaning(tap) for tap in facts["taps"]},
            "stored as": f"{facts['dtype']}, profile {facts['profile']}{_rounding(facts)}",
            **{f"error of {tap}": _shown(values) for tap, values in errors},
        },
        "corpus": {
            **{f"file {file['name']}": f"{file['bytes']:,} bytes" for file in facts["files"]},
            **_shown_settings(facts["corpus"]),
            **{f"samples of {name}": value for name, value in facts["kinds"].items()},
            **{name: value for name, value in facts["counts"].items() if value},
        },
        **({"aligned to": facts["alignment"]} if facts["alignment"] else {}),
        "bytes": _size_rows(facts) | {"all": facts["bytes"]},
        "made with": facts["versions"],
    }
    texts = {
        title: format_table([(f"  {name}", _shown(value)) for name, value in rows.items()])
        for title, rows in blocks.items()
    }
    if facts["report"]:
        table = format_report(Report.from_dict(facts["report"]))
        texts["corpus"] += "\n\nrecords\n" + indent(table, "  ")
    return "\n\n".join(f"{title}\n{text}" for title, text in texts.items())


def _rounding(facts: dict[str, Any]) -> str:
    """Return what is to be said of states that are rounded more than the profile tells."""
    if facts["rounded_as"] in ("", facts["profile"]):
        return ""
    return f", of states rounded by the profile {facts['rounded_as']}"


def _shown(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else str("none" if value is None else value)


def _shown_settings(corpus: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a corpus that are not empty; of a chat template only its size."""
    shown = {name: value for name, value in corpus.items() if value not in ("", [])}
    if "chat_template" in shown:
        shown["chat_template"] = f"given, {len(shown['chat_template']):,} characters"
    for name, value in shown.items():
        shown[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return shown


def _tap_meaning(tap: str) -> str:
    if tap == "final":
        return "after the final norm: input of the LM head"
    if tap == "stable":
        return "as final, at the last token that no later text can change"
    if tap == "prenorm":
        return "residual stream before the final norm"
    if tap == "layer.0":
        return "token embedding, as it enters the first block"
    return f"residual stream after block {tap.removeprefix('layer.')}, not normed"


def _size_rows(facts: dict[str, Any]) -> dict[str, str]:
    totals: Counter[str] = Counter()
    for name, size in facts["array_bytes"].items():
        totals[_SMALL_ARRAYS.get(name.partition("/")[0], name)] += size
    has_scales = any(name.startswith("scale/") for name in facts["array_bytes"])
    scales = " with its scales" if has_scales else ""
    rows = {}
    for name, size in totals.items():
        ratio = facts["ratio_to_raw"].get(name.removeprefix("hidden/"))
        note = f", {ratio:.3f} of raw {facts['dtype']}{scales}" if ratio else ""
        rows[name] = f"{size:,}{note}"
    return rows
