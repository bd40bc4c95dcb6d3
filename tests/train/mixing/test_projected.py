"""Projections of a whole store against a projection of each position alone, by plain code."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mixed_stores import ROWS, STORE, make_anchor, make_source

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.format.alignment import UnitAlignment, read_alignment
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import Unit
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.frozen_head import frozen_head
from carryon.train.mixing.healing import HealingStates, heal_from_stable
from carryon.train.mixing.projected import ProjectedSources, project_sources
from carryon.train.mixing.projection import Heads, project_full
from carryon.train.mixing.sources import open_sources

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor, and two sources."""
    root = tmp_path_factory.mktemp("mixed")
    anchor = make_anchor(root)
    make_source(root, anchor)
    make_source(root, anchor, name="second", kind="metaspace", vocab_size=360, seed=5)
    return root


def project(folder: Path, *names: str) -> tuple[Store, ProjectedSources]:
    """Project the sources onto the anchor."""
    anchor = Store.open(folder / "anchor")
    projected = project_sources(
        anchor,
        open_sources(anchor, [str(folder / name) for name in names]),
        base=get_base_states(anchor, device=CPU),
        stream=StreamSettings(),
        loss=LossSettings(),
        device=CPU,
    )
    return anchor, projected


@pytest.mark.parametrize("name", ["source", "second"])
def test_each_position_is_the_projection_of_its_own_states(folder: Path, name: str) -> None:
    anchor, projected = project(folder, name)
    [source] = projected.sources
    mapped = source.vocabulary_map
    own, other = (
        frozen_head(store.head(), device=CPU, dtype=torch.float32)
        for store in (anchor, source.store)
    )
    heads = Heads(anchor=own, source=other)
    healed = inside_characters = 0

    @cache
    def read(unit: int) -> tuple[Unit, Unit, UnitAlignment]:
        store = source.store
        trees = read_alignment(store.root, store.manifest, unit)
        return anchor.read_unit(unit), store.read_unit(unit), trees

    whole_head, every = anchor.head(), np.arange(own.vocab_size)[None]
    for at, row in enumerate(projected.rows.tolist()):
        unit, within = divmod(row, anchor.unit_tokens)
        mine, theirs, trees = read(unit)
        target = int(mine.tokens[within + 1])
        state = torch.from_numpy(mine.hidden["final"][within : within + 1])
        log_probs = torch.from_numpy(
            np.asarray(whole_head.logits(state.numpy(), every))
        ).log_softmax(dim=1)
        assert float(projected.anchor[at]) == pytest.approx(float(log_probs[0, target]), abs=1e-4)
        if trees.exact[within] < 0:
            assert float(projected.log_probs[at, 0]) == float(projected.anchor[at])
            continue
        covered = int(trees.covered[within])
        healing = None
        text = b"".join(mapped.anchor[token] or b"" for token in mine.tokens[: within + 1])
        stable = torch.from_numpy(theirs.hidden["stable"][within : within + 1])
        exact = torch.from_numpy(theirs.hidden["final"][within : within + 1])
        path, node = [], int(trees.exact[within])
        while node not in (trees.stable[within], -1):
            path.append(int(trees.tokens[node]))
            node = int(trees.parents[node])
        if trees.is_whole[within]:
            if covered and trees.stable[within] < 0:
                continue  # nothing to heal from
            healing = heal_from_stable(
                stable,
                [text[len(text) - covered :]],
                torch.from_numpy(mine.tokens[within : within + 1]),
                mapped,
            )
            if covered and healing.next_tokens.tolist() != path[-1:]:
                continue  # a rare word: its first token is not the longest
            healed += covered > 0
        else:
            inside = text[len(text.decode(errors="ignore").encode()) :]
            steps = [(exact, inside, mapped.first_token(inside))]
            if path and trees.stable[within] >= 0:
                steps.insert(0, (stable, text[len(text) - covered :], path[-1]))
            healing = HealingStates(
                rows=torch.zeros(len(steps), dtype=torch.int64),
                states=torch.cat([state for state, _, _ in steps]),
                covered=[behind for _, behind, _ in steps],
                next_tokens=torch.tensor([token for _, _, token in steps]),
                anchor_tokens=torch.tensor([int(mine.tokens[within])] * len(steps)),
            )
            inside_characters += 1
        expected, features = project_full(
            exact_states=exact,
            healing=healing,
            anchor_states=state,
            heads=heads,
            vocabulary_map=mapped,
        )
        assert float(expected.sum()) == pytest.approx(1, abs=1e-4)
        wanted = float(expected[0, target].clamp_min(1e-30).log())
        assert float(projected.log_probs[at, 0]) == pytest.approx(wanted, abs=1e-3)
        assert torch.allclose(projected.features[at, 0], features[0], atol=1e-3)
    assert healed > 20
    assert inside_characters >= 5


def test_all_supervised_positions_are_there_once(folder: Path) -> None:
    anchor, projected = project(folder, "source", "second")
    expected = sum(
        int(anchor.read_sample(index, taps=[]).loss_mask[1:].sum())
        for index in range(anchor.num_samples)
    )
    assert len(projected.rows) == len(np.unique(projected.rows)) == expected
    assert projected.log_probs.shape == (expected, 2)
    assert projected.names == ["source-base", "second-base"]
    assert not torch.allclose(projected.log_probs[:, 0], projected.log_probs[:, 1])
    first, _ = project(folder, "source")[1], None
    assert torch.equal(first.log_probs[:, 0], projected.log_probs[:, 0])  # from the cache


def test_a_sample_that_the_source_lacks_has_the_distribution_of_the_anchor(
    folder: Path, tmp_path: Path
) -> None:
    rows = [row for row in ROWS if row["id"] != "text-1"]
    make_source(tmp_path, folder / "anchor", rows=rows, drop_missing=True)
    anchor = Store.open(folder / "anchor")
    (tmp_path / "anchor").symlink_to(folder / "anchor")
    _, projected = project(tmp_path, "source")
    is_lost = projected.of_samples(np.array([anchor.index_of("text-1")]), anchor.sample_lengths)
    assert 0 < int(is_lost.sum()) < len(is_lost)
    assert torch.equal(projected.log_probs[is_lost, 0], projected.anchor[is_lost])
    assert not torch.equal(projected.log_probs[~is_lost, 0], projected.anchor[~is_lost])


def test_wrong_stores_are_refused(folder: Path, tmp_path: Path) -> None:
    anchor = Store.open(folder / "anchor")
    other = make_anchor(tmp_path, ROWS[:6])
    with pytest.raises(InputError, match="expected a store that is aligned to .*, got the anchor"):
        open_sources(anchor, [str(folder / "anchor")])
    with pytest.raises(InputError, match="got a store alone. Fix: carryon extract --align-to"):
        open_sources(anchor, [str(other)])
    with pytest.raises(InputError, match="aligned to the store .* of"):
        open_sources(Store.open(other), [str(folder / "source")])
    for name, dtype in (("one", "float32"), ("two", "bfloat16")):
        make_source(tmp_path, folder / "anchor", name=name, store=replace(STORE, dtype=dtype))
    with pytest.raises(InputError, match="each base once, .* are stores of one base"):
        open_sources(anchor, [str(tmp_path / name) for name in ("one", "two")])
    (tmp_path / "again").symlink_to(folder / "source")
    with pytest.raises(InputError, match="each base once"):
        open_sources(anchor, [str(folder / "source"), str(tmp_path / "again")])


def test_a_store_without_head_or_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    make_source(tmp_path, folder / "anchor")
    anchor = Store.open(folder / "anchor")
    moved = tmp_path / "source-base"
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="expected the tokenizer of its base.*no such folder"):
        open_sources(anchor, [str(tmp_path / "source")])
    for path in (tmp_path / "source" / "head").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(CarryOnError, match="head"):
        open_sources(anchor, [str(tmp_path / "source")])
