"""Held-out samples are held out, and always the same ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.train.config import TrainSettings
from carryon.train.data.datasets import open_data
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


def halves(groups: list[int], *, share: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    split = split_samples(
        np.zeros(len(groups), dtype=np.uint8),
        share=share,
        seed=seed,
        digest=DIGEST,
        groups=np.array(groups, dtype=np.uint64),
    )
    return split.train.tolist(), split.held_out.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_groups_that_all_differ_are_split_as_samples_without_groups(seed: int) -> None:
    groups = np.random.default_rng(9).permutation(200).tolist()
    marked = np.zeros(200, dtype=np.uint8)
    before = split_samples(marked, share=0.05, seed=seed, digest=DIGEST)
    assert halves(groups, share=0.05, seed=seed)[1] == before.held_out.tolist()
    # The choice of a version without groups: the same runs give the same bits.
    random = np.random.default_rng([seed, int(DIGEST[:16], 16)])
    assert before.held_out.tolist() == sorted(random.permutation(200)[:10].tolist())


@pytest.mark.parametrize("seed", range(8))
def test_no_group_is_in_both_halves(seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 30, 100).tolist()
    train, held_out = halves(groups, seed=seed)
    assert sorted([*train, *held_out]) == list(range(100))
    assert not {groups[index] for index in train} & {groups[index] for index in held_out}
    assert 12 <= len(held_out) <= 20, "about a fifth of the samples, not of the groups"


def test_a_group_larger_than_the_held_out_half_is_trained_on() -> None:
    groups = [0] * 90 + list(range(1, 11))
    for seed in range(8):
        _, held_out = halves(groups, seed=seed)
        assert held_out == list(range(90, 100))


def test_where_every_group_is_larger_than_the_held_out_half_the_smallest_is_held_out() -> None:
    groups = [1] * 40 + [2] * 30 + [3] * 50
    assert halves(groups, share=0.05)[1] == list(range(40, 70))


def test_pieces_of_a_single_text_are_split_one_by_one() -> None:
    assert len(halves([7] * 50)[1]) == 10


def test_a_mark_holds_out_the_whole_group() -> None:
    split = split_samples(
        np.array([0, 1, 0, 0], dtype=np.uint8),
        share=0.5,
        seed=0,
        digest=DIGEST,
        groups=np.array([5, 5, 6, 6], dtype=np.uint64),
    )
    assert split.held_out.tolist() == [0, 1]


def test_records_of_a_split_group_are_held_out_together_and_it_is_said(
    tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "the ", "completion": f"thing {i}", "split_group": i % 4, "id": f"{i % 4}-{i}"}
        for i in range(24)
    ]
    for name, marks in (("plain", {}), ("marked", {"split": "held-out"})):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | marks]))
        extract_tiny(tiny_base, data, tmp_path / name)
    settings = TrainSettings.from_options(held_out_ratio=0.25, device="cpu")

    def groups(*names: str) -> list[set[str]]:
        with caplog.at_level("INFO"):
            opened = open_data([str(tmp_path / name) for name in names], settings)
        store, halves = opened.store, (opened.split.train, opened.split.held_out)
        return [{store.sample_id(i).rpartition(":")[2][0] for i in half} for half in halves]

    train, held_out = groups("plain")
    assert (len(train), len(held_out), train & held_out) == (3, 1, set())
    assert "held out with them" not in caplog.text
    assert "3" in groups("marked")[1]
    expected = "marked: 1 samples are marked as held out, 5 more are held out with them"
    assert expected in caplog.text
    caplog.clear()
    assert "3" in groups("plain", "marked")[1]
    assert expected in caplog.text


def test_it_is_said_where_all_records_are_of_one_split_group(
    tiny_base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "the ", "completion": f"thing {i}", "split_group": "all"} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_tiny(tiny_base, data, tmp_path / "store")
    with caplog.at_level("INFO"):
        opened = open_data([str(tmp_path / "store")], TrainSettings.from_options(device="cpu"))
    assert (len(opened.split.train), len(opened.split.held_out)) == (7, 1)
    assert "all samples are of one record or split group: they are split one by one" in caplog.text


def test_a_split_is_not_made_up_where_every_marked_record_was_lost(
    tiny_base: Base, tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "prompt": "the ", "completion": "thing " * 3} for i in range(6)]
    rows += [{"id": "lost", "prompt": "the", "completion": "", "split": "held-out"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract_tiny(tiny_base, data, tmp_path / "store")

    with pytest.raises(InputError, match=r"expected held-out samples.*got none: 1 marked .*Fix:"):
        open_data([str(tmp_path / "store")], TrainSettings())

    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    extract_tiny(tiny_base, data, tmp_path / "unmarked")
    assert len(open_data([str(tmp_path / "unmarked")], TrainSettings()).split.held_out) == 1
    with pytest.raises(InputError, match="expected held-out samples"):
        open_data([str(tmp_path / "unmarked"), str(tmp_path / "store")], TrainSettings())
