"""Drawing tokens from distributions."""

import pytest
import torch

from carryon.cache.errors import InputError
from carryon.train.inference.draw import BLOCK, sample_tokens, sampling_processors


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    random = torch.Generator().manual_seed(0)
    row = torch.softmax(3 * torch.randn(2 * BLOCK + 100, generator=random), dim=0)
    row[5:40] = 0
    draws = 200_000
    uniform = torch.rand(draws, generator=random)
    tokens = torch.cat(
        [sample_tokens(row.expand(len(part), -1), part) for part in uniform.split(2000)]
    )
    counts = torch.bincount(tokens, minlength=len(row)).double()
    expected = draws * row.double() / row.double().sum()
    spread = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()  # chi-squared
    assert spread < 1.15 * len(row)
    assert counts[5:40].sum() == 0


def test_a_draw_is_the_first_token_whose_running_sum_exceeds_it() -> None:
    random = torch.Generator().manual_seed(1)
    rows = torch.rand(50, 3 * BLOCK + 7, generator=random).double()
    rows[rows < 0.7] = 0
    rows /= rows.sum(dim=1, keepdim=True)
    uniform = torch.rand(50, generator=random)
    expected = (rows.cumsum(dim=1) <= uniform.unsqueeze(1)).sum(dim=1)
    found = sample_tokens(rows.float(), uniform)
    assert (found - expected).abs().max() <= 3  # of rounding at the bounds
    assert (found == expected).double().mean() > 0.9
    assert (rows.gather(1, found.unsqueeze(1)) > 0).all()


def test_no_token_without_probability_is_drawn_at_the_bounds() -> None:
    rows = torch.zeros(4, 2 * BLOCK)
    rows[0, 3] = 1
    rows[1, BLOCK + 1] = 1
    rows[2, 0] = 1e-30
    rows[3, [1, BLOCK]] = 0.5
    low = sample_tokens(rows, torch.zeros(4))
    high = sample_tokens(rows, torch.full((4,), 1 - 2**-24))
    assert low.tolist() == [3, BLOCK + 1, 0, 1]
    assert high.tolist() == [3, BLOCK + 1, 0, BLOCK]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_refused(wrong: float) -> None:
    scores = torch.zeros(2, BLOCK + 1)
    scores[1, 3] = wrong
    draw = sampling_processors(temperature=1.0, top_p=1.0)
    with pytest.raises(InputError, match="logits: expected numbers.* Fix: --compute-dtype float32"):
        draw(torch.zeros(2, 1), scores)


def test_top_p_leaves_out_the_tail_and_temperature_sharpens() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    torch.manual_seed(0)
    cut = sampling_processors(temperature=1.0, top_p=0.8)(torch.zeros(4000, 1), scores)
    assert set(cut.argmax(dim=1).tolist()) == {0, 1}
    cold = sampling_processors(temperature=0.1, top_p=1.0)(torch.zeros(4000, 1), scores)
    assert (cold.argmax(dim=1) == 0).double().mean() > 0.99
