"""Tiny stores of one base that are aligned to those of another."""

import json
from pathlib import Path
from typing import Any

import torch

from carryon.cache.base.model import Base
from carryon.cache.extraction.aligned import plan_aligned, run_aligned
from carryon.cache.settings import ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.families import make_family_base
from support.aligned_tokenizers import CHATML, TEXTS, make_tokenizer
from support.tiny_stores import small_pieces

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=512)
SETTINGS = StoreSettings(dtype="float32", unit_tokens=256, taps=["layer.1", "final"])
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 12, "b": "x y"}},
}
ROWS: list[dict[str, Any]] = [
    {"id": "code", "text": TEXTS[1] + TEXTS[2]},
    {"id": "words", "text": TEXTS[0] + TEXTS[3]},
    {"id": "emoji", "text": "emoji \U0001f600\U0001f468\u200d\U0001f469 \u4f60\u597d"},
    {"id": "pair", "prompt": "The quick", "completion": "er fox's den"},
    {
        "id": "chat",
        "messages": [
            {"role": "user", "content": "  What is 12 + 30? \u4e16\u754c"},
            {"role": "assistant", "content": "Let me see: they've", "tool_calls": [CALL]},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": TEXTS[1]},
        ],
    },
]


def make_base(folder: Path, kind: str, family: str = "llama", **changes: Any) -> Path:  # noqa: ANN401
    """Save a tiny base with a tokenizer of a kind."""
    size = changes.pop("vocab", 300)
    template = changes.pop("template", CHATML)
    return make_family_base(
        folder,
        family,
        tokenizer=make_tokenizer(kind, vocab_size=size, template=template),
        vocab_size=size + 300,
        special_ids={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
        dtype=torch.float32,
        seed=0,
        **changes,
    )


def write(rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """Write rows as JSON lines, a file for each kind of record."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for key in ("text", "prompt", "messages"):
        own = [json.dumps(row) for row in rows if key in row]
        if own:
            (folder / f"{key}.jsonl").write_text("\n".join(own) + "\n")
            paths.append(str(folder / f"{key}.jsonl"))
    return paths


def align(
    base: Base,
    anchor: Path,
    out: Path,
    rows: list[dict[str, Any]] = ROWS,
    **changes: Any,  # noqa: ANN401
) -> Store:
    """Extract an aligned store, and open it."""
    given = {"store": SETTINGS, "forward": FORWARD, **changes}
    with small_pieces():
        data = write(rows, out.parent / f"{out.name}-data")
        run_aligned(plan_aligned(base=base, data=data, align_to=anchor, out=out, **given))
    return Store.open(out, allow_aligned=True)
