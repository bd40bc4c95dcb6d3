"""Held-out samples are held out, and always the same ones."""

import numpy as np
import pytest

from carryon.cache.errors import InputError
from carryon.train.data.split import split_samples

DIGEST = "ab" * 32


def test_the_marks_of_the_store_decide_where_there_are_any() -> None:
    marked = np.array([0, 1, 0, 1, 0], dtype=np.uint8)

    split = split_samples(marked, share=0.5, seed=0, digest=DIGEST)

    assert split.train.tolist() == [0, 2, 4]
    assert split.held_out.tolist() == [1, 3]


def test_without_marks_a_seeded_share_is_held_out() -> None:
    marked = np.zeros(200, dtype=np.uint8)

    split = split_samples(marked, share=0.05, seed=0, digest=DIGEST)
    again = split_samples(marked, share=0.05, seed=0, digest=DIGEST)
    other = split_samples(marked, share=0.05, seed=1, digest=DIGEST)

    assert len(split.held_out) == 10
    assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(200))
    assert split.held_out.tolist() == again.held_out.tolist()
    assert split.held_out.tolist() != other.held_out.tolist()
    assert not marked.any(), "the caller's array was changed"


@pytest.mark.parametrize("marks", [[0], [1], [1, 1]])
def test_an_empty_half_is_refused(marks: list[int]) -> None:
    with pytest.raises(InputError, match="expected at least one to train on and one to evaluate"):
        split_samples(np.array(marks, dtype=np.uint8), share=0.5, seed=0, digest=DIGEST)
