"""A composed mixture computes what training saw, and a cache changes no token of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.composed import NAMES, generate, load
from support.mixed_stores import ROWS

from carryon.cache.format.framing import Framing
from carryon.cache.store.reader import Store
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.inference.mixing.session import Prompts
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.losses.base_states import get_base_states
from carryon.train.mixing.gate import mixture_log_probs
from carryon.train.mixing.projected import ProjectedSources, project_sources
from carryon.train.mixing.sources import open_sources

TEXTS = [
    "The quick brown f",
    "def area(width, height):\n    if wid",
    "emoji \U0001f600\U0001f468",
    "Gr\u00fc\u00dfe aus K\u00f6ln, caf\u00e9, \u4f60\u597d",
    "Two  spaces.\n\n",
    "    return width * hei",
    "12345678 and 3.1",
    "x",
]


@pytest.fixture(scope="module")
def anchor(folder: Path) -> Store:
    return Store.open(folder / "anchor")


@pytest.fixture(scope="module")
def projected(folder: Path, anchor: Store) -> ProjectedSources:
    cpu = torch.device("cpu")
    return project_sources(
        anchor,
        open_sources(anchor, [str(folder / name) for name in NAMES]),
        base=get_base_states(anchor, device=cpu),
        stream=StreamSettings(),
        loss=LossSettings(),
        device=cpu,
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("bottleneck", "text-1"),
        ("bottleneck", "text-3"),
        ("bottleneck", "emoji"),
        ("bottleneck", "chat"),
        ("bottleneck", "pair"),
        ("none", "text-6"),
        ("none", "emoji"),
    ],
)
def test_teacher_forced_it_is_the_mixture_of_the_aligned_stores(
    folder: Path, anchor: Store, projected: ProjectedSources, kind: str, name: str
) -> None:
    model, row = load(folder, kind), next(row for row in ROWS if row["id"] == name)
    index = anchor.index_of(name)
    sample = anchor.read_sample(index, taps=["final"])
    tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
    trained = np.flatnonzero(sample.loss_mask[1:])
    more: dict[str, Any] = {}
    if "text" not in row:
        prompt = row["prompt"] if "prompt" in row else row["messages"][:1]
        framing = Framing(kinds={"chat" if "messages" in row else "prompt and completion": 1})
        texts = model.composition.read_prompts([prompt], framing=framing, chat="auto")
        more = {"prompts": Prompts(length=int(trained[0]) + 1, texts=texts)}
    with torch.no_grad():
        output = model(tokens, use_cache=False, **more)
        own = CarryOnForCausalLM.forward(model, tokens, use_cache=False).logits
    rows = anchor.sample_starts[index] + trained
    at = np.searchsorted(projected.rows, rows)
    assert (projected.rows[at] == rows).all()
    within, targets = torch.from_numpy(trained), tokens[0, 1:][trained]
    states = torch.from_numpy(sample.hidden["final"])[within]
    anchor_logs = own[0, within].log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        logits = model.composition.gate(states, projected.features[at])
    expected = mixture_log_probs(logits, anchor_logs, projected.log_probs[at])
    got = output.logits[0, within].gather(1, targets[:, None])[:, 0]
    assert len(targets) >= 4
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
    sums = output.logits[0, within].logsumexp(dim=1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bottleneck", "none"])
def test_a_cache_changes_no_token(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    together = generate(model, TEXTS)
    assert torch.equal(together, generate(model, TEXTS, use_cache=False))
    for text, row in list(zip(TEXTS, together, strict=True))[::3]:
        alone = generate(model, [text])[0]
        assert torch.equal(alone, row[: len(alone)])
    assert len({tuple(row) for row in together.tolist()}) > 4
