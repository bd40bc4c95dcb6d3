"""`mix-corpus`: windows of documents, split by document, for stores of several bases."""

import json
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.cli.output import print_result
from carryon.tools.compare.command import refuse_other_data
from carryon.tools.compare.data import prepare_material
from carryon.tools.compare.settings import CompareSettings

_SPARE = 3
"""Ends of documents and texts that the other half repeats are dropped, and windows are drawn from
many documents."""
_HELD_OUT_EVERY = 8
"""One document in eight is held out."""


def make_mix_corpus(
    *,
    base: str,
    out: str,
    data: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    corpus: str = "",
    tokens: int = 120_000,
    held_out_tokens: int = 12_000,
    window_tokens: int = 512,
) -> dict[str, Any]:
    """Write documents as windows that each say which half they are of; a step of experiment-mix.

    Whole documents are held out. Windows of a half that repeat the other are dropped, as in
    carryon compare. The last line on stdout is a JSON line with the counts and the overlap.

    Example:
        python -m carryon.tools.bench mix-corpus --base B --corpus python --out data

    Args:
        base: Base whose tokenizer counts tokens: hub id, folder or .gguf file.
        out: Folder; OUT/corpus.jsonl is the corpus.
        data: Files of documents. Those that mark held-out records are split so.
        corpus: Instead of --data: gsm, python, pydoc, manpages or mixed.
        tokens: Training tokens at most.
        held_out_tokens: Held-out tokens at most.
        window_tokens: Tokens of the windows that longer texts are cut into.
    """
    folder = Path(out)
    if bool(data) == bool(corpus):
        raise InputError("--data: expected either --data or --corpus. Fix: --corpus python")
    named = folder / f"{corpus}.jsonl"
    data = [str(named)] if corpus else data
    settings = CompareSettings(
        tokens=tokens, held_out_tokens=held_out_tokens, window_tokens=window_tokens
    )
    refuse_other_data(folder, {"data": data, **settings.shared()})
    if corpus:
        wanted = _SPARE * max(tokens + held_out_tokens, _HELD_OUT_EVERY * held_out_tokens)
        write_named_corpus(corpus, named, num_tokens=wanted)
    material = prepare_material(settings, base=base, out=folder, data=data)
    rows = [
        json.loads(line) | {"split": split}
        for split, file in (("train", material.train_file), ("held-out", material.held_out_file))
        for line in file.read_bytes().splitlines()
    ]
    path = folder / "corpus.jsonl"
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    facts = material.facts
    return print_result(
        {"out": str(path), **facts},
        f"{path}: {facts['train_samples']:,} training and {facts['held_out_samples']:,} held-out "
        f"windows; {facts['shared_ratio']:.1%} of the runs of 32 held-out tokens are in training",
    )
