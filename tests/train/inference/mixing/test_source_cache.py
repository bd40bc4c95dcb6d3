"""Rows that are cropped apart against each row alone from its beginning."""

import random
from pathlib import Path

import pytest
import torch
from support.aligned_tokenizers import make_tokenizer

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.families import make_family_base
from carryon.train.inference.mixing import source_cache
from carryon.train.inference.mixing.source_cache import SourceCache


def make(folder: Path, family: str) -> Base:
    """Return a tiny base; gemma3 has layers with a window of 16 tokens."""
    path = make_family_base(
        folder,
        family,
        tokenizer=make_tokenizer("qwen"),
        vocab_size=700,
        special_ids={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
        dtype=torch.float32,
        seed=0,
    )
    return load_base(str(path), forward=ForwardSettings(device="cpu", compute_dtype="float32"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_states_are_those_of_each_row_alone(
    tmp_path: Path, family: str, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, draw = make(tmp_path, family), random.Random(num_rows)
    monkeypatch.setattr(source_cache, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(source_cache, "_LEAST_UNUSED", 3)
    cache = SourceCache(base, num_rows=num_rows)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    most_slots = 0
    for step in range(30):
        kept = [len(row) - draw.choice([0, 0, 0, 1, 2, 3]) for row in rows]
        kept = [max(each, 0) for each in kept]
        sizes = [draw.choice([0, 1, 1, 2, 4]) if step else draw.randrange(1, 20) for _ in rows]
        new = [[draw.randrange(2, 600) for _ in range(size)] for size in sizes]
        if step == 15:
            order = [draw.randrange(num_rows) for _ in rows]
            rows, kept = [rows[at] for at in order], [kept[at] for at in order]
            cache.select(order)
        found = cache.run(kept, new)
        rows = [row[:num] + more for row, num, more in zip(rows, kept, new, strict=True)]
        for row, more, states in zip(rows, new, found, strict=True):
            assert len(states) == len(more)
            if more:
                alone = capture(base, ["final"], torch.tensor([row]))["final"][0]
                torch.testing.assert_close(states, alone[-len(more) :], rtol=0, atol=2e-5)
        most_slots = max(most_slots, cache.num_slots - max(map(len, rows)))
    assert most_slots < 30
    assert num_rows == 1 or most_slots > 0
