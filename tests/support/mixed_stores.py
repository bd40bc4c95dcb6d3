"""A tiny anchor, and stores of other tiny bases with other tokenizers that are aligned to it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from carryon.cache.base.model import load_base
from carryon.cache.extraction.aligned import plan_aligned, run_aligned
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings, StoreSettings
from carryon.tools.bench.families import make_family_base
from support.aligned_tokenizers import CHATML, TEXTS, make_tokenizer
from support.corpus_files import write_lines
from support.tiny_stores import small_pieces

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=512)
STORE = StoreSettings(dtype="float32", unit_tokens=256, taps=["final"])
_BODY = "".join(TEXTS[:4])
ROWS: list[dict[str, Any]] = [
    *(
        {
            "id": f"text-{index}",
            "text": _BODY[23 * index : 23 * index + 90 + 7 * index],
            "split": "held-out" if index in (3, 7) else "train",
        }
        for index in range(9)
    ),
    {"id": "emoji", "text": "emoji \U0001f600\U0001f468 \u4f60\u597d", "split": "train"},
    {"id": "pair", "prompt": "The quick", "completion": "er fox's den", "split": "train"},
    {
        "id": "chat",
        "messages": [
            {"role": "user", "content": "  What is 12 + 30? \u4e16\u754c"},
            {"role": "assistant", "content": TEXTS[1]},
        ],
        "split": "train",
    },
]


def write_data(folder: Path, rows: list[dict[str, Any]] = ROWS) -> list[str]:
    """Write rows as JSON lines, a file for each kind of record."""
    keys = [key for key in ("text", "prompt", "messages") if any(key in row for row in rows)]
    return [
        str(write_lines(folder / f"{key}.jsonl", *(row for row in rows if key in row)))
        for key in keys
    ]


def make_base(
    folder: Path, kind: str, *, vocab_size: int, seed: int = 0, steps: int = 0, width: int = 16
) -> Path:
    """Save a tiny base with a tokenizer of a kind, trained on the texts for some steps."""
    path = make_family_base(
        folder,
        "llama",
        tokenizer=make_tokenizer(kind, vocab_size=vocab_size, template=CHATML),
        vocab_size=vocab_size + 300,
        special_ids={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
        dtype=torch.float32,
        seed=seed,
        max_position_embeddings=512,
        hidden_size=width,
    )
    if steps:
        _fit(path, steps)
    return path


def _fit(path: Path, steps: int) -> None:
    """Let a base learn the texts, those that are held out too, token by token."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [row["text"] for row in ROWS if "text" in row]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)


def make_anchor(folder: Path, rows: list[dict[str, Any]] = ROWS, *, seed: int = 0) -> Path:
    """Extract the anchor's store from a random base; return its folder."""
    base = make_base(folder / "anchor-base", "gpt2", vocab_size=300, seed=seed)
    with small_pieces():
        extract(
            base=str(base),
            data=write_data(folder / "data", rows),
            out=folder / "anchor",
            store=STORE,
            forward=FORWARD,
        )
    return folder / "anchor"


def make_source(
    folder: Path,
    anchor: Path,
    *,
    name: str = "source",
    kind: str = "qwen",
    vocab_size: int = 420,
    seed: int = 1,
    steps: int = 0,
    rows: list[dict[str, Any]] = ROWS,
    width: int = 16,
    **changes: Any,  # noqa: ANN401
) -> Path:
    """Extract a store of another base that is aligned to the anchor's; return its folder."""
    sizes = {"vocab_size": vocab_size, "seed": seed, "steps": steps, "width": width}
    base = make_base(folder / f"{name}-base", kind, **sizes)
    with small_pieces():
        plan = plan_aligned(
            base=load_base(str(base), forward=FORWARD),
            data=write_data(folder / f"{name}-data", rows),
            align_to=anchor,
            out=folder / name,
            **{"store": STORE, "forward": FORWARD, **changes},
        )
        run_aligned(plan)
    return folder / name
