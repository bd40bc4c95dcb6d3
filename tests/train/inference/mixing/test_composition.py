"""A composed mixture computes what training saw, and generates the same with and without a cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.composed import generate, load, make_mixtures
from support.mixed_stores import ROWS

from carryon.cache.store.reader import Store
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.losses.base_states import get_base_states
from carryon.train.mixing.gate import mixture_log_probs
from carryon.train.mixing.projected import project_sources
from carryon.train.mixing.sources import open_sources

TEXTS = [
    "The quick brown f",
    "def area(width, height):\n    if wid",
    "emoji \U0001f600\U0001f468",
    "Gr\u00fc\u00dfe aus K\u00f6ln, caf\u00e9, \u4f60\u597d",
    "Two  spaces.\n\n",
    "x",
    "    return width * hei",
    "12345678 and 3.1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixtures(tmp_path_factory.mktemp("composed"))


@pytest.mark.parametrize("kind", ["bottleneck", "none"])
def test_teacher_forced_it_is_the_mixture_of_the_aligned_stores(folder: Path, kind: str) -> None:
    anchor, model = Store.open(folder / "anchor"), load(folder, kind)
    cpu = torch.device("cpu")
    base = get_base_states(anchor, device=cpu)
    projected = project_sources(
        anchor,
        open_sources(anchor, [str(folder / name) for name in ("good", "random")]),
        base=base,
        stream=StreamSettings(),
        loss=LossSettings(),
        device=cpu,
    )
    ids = [row["id"] for row in ROWS if "text" in row]
    num_targets = 0
    for name in ids:
        index = anchor.index_of(name)
        sample = anchor.read_sample(index, taps=["final"])
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        with torch.no_grad():
            output = model(tokens, use_cache=False)
            own = CarryOnForCausalLM.forward(model, tokens, use_cache=False).logits
        targets = tokens[0, 1:]
        log_probs = output.logits[0, :-1].gather(1, targets[:, None])[:, 0]
        rows = anchor.sample_starts[index] + np.flatnonzero(sample.loss_mask[1:])
        at = np.searchsorted(projected.rows, rows)
        assert (projected.rows[at] == rows).all()
        within = torch.from_numpy(rows - anchor.sample_starts[index])
        states = torch.from_numpy(sample.hidden["final"])[within]
        anchor_logs = own[0].log_softmax(dim=1)[within, targets[within]]
        with torch.no_grad():
            logits = model.composition.gate(states, projected.features[at])
        expected = mixture_log_probs(logits, anchor_logs, projected.log_probs[at])
        torch.testing.assert_close(log_probs[within], expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(
            output.logits[0].logsumexp(dim=1), torch.zeros(len(targets) + 1), rtol=0, atol=1e-4
        )
        num_targets += len(rows)
    assert num_targets > 300


@pytest.mark.parametrize("kind", ["bottleneck", "none"])
def test_a_cache_changes_no_token(folder: Path, kind: str) -> None:
    model = load(folder, kind)
    together = generate(model, TEXTS)
    assert torch.equal(together, generate(model, TEXTS, use_cache=False))
    for text, row in zip(TEXTS, together, strict=True):
        alone = generate(model, [text])[0]
        assert torch.equal(alone, generate(model, [text], use_cache=False)[0])
        assert torch.equal(alone, row[: len(alone)])
    assert len({tuple(row) for row in together.tolist()}) > 4
