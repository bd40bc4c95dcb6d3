"""A store aligned to another: states against plain forward passes, edits, refusals, resume."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.aligned_stores import FORWARD, ROWS, SETTINGS, align, make_base, write
from support.aligned_tokenizers import BRACKETS
from support.tiny_stores import SHARING, files_below, small_pieces

from carryon.cache.alignment.tree import visible
from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.exchange.recoding import recode
from carryon.cache.extraction.aligned import plan_aligned, run_aligned
from carryon.cache.extraction.aligned_forward import check_tree_forward, tree_inputs
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.repair import repair
from carryon.cache.format.alignment import read_alignment
from carryon.cache.format.zarr_metadata import receipt_path, shard_path
from carryon.cache.settings import CorpusSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.families import FAMILIES, Family


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of another base."""
    folder = tmp_path_factory.mktemp("anchor")
    with small_pieces():
        extract(
            base=str(make_base(folder / "base", "gpt2", max_position_embeddings=512)),
            data=write(ROWS, folder / "data"),
            out=folder / "store",
            store=SETTINGS,
            forward=FORWARD,
        )
    return folder / "store"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The base that is aligned."""
    folder = tmp_path_factory.mktemp("other")
    path = make_base(
        folder / "base", "qwen", vocab=420, template=BRACKETS, max_position_embeddings=512
    )
    return load_base(str(path), forward=FORWARD)


def test_one_of_several_processes_writes_the_states_of_a_process_alone(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    alone = align(other, anchor, tmp_path / "alone")
    with small_pieces():
        data = write(ROWS, tmp_path / "data")
        given: dict[str, Any] = {"store": SETTINGS, "forward": FORWARD, "is_shared": True}
        plan = plan_aligned(
            base=other, data=data, align_to=anchor, out=tmp_path / "shared", **given
        )
        report = run_aligned(plan, sharing=SHARING)
    assert report.is_finished
    shared = Store.open(tmp_path / "shared", allow_aligned=True)
    assert shared.fingerprint == alone.fingerprint
    for number in range(alone.num_units):
        theirs, ours = alone.read_unit(number), shared.read_unit(number)
        for tap, states in theirs.hidden.items():
            assert np.array_equal(states, ours.hidden[tap])


def test_an_aligned_store_is_recoded_with_its_trees_and_back(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    store = align(other, anchor, tmp_path / "aligned")
    recode(store.root, out=tmp_path / "raw", profile="raw")
    recode(tmp_path / "raw", out=tmp_path / "back", profile="exact")
    assert verify(tmp_path / "raw", depth="full").is_complete
    assert files_below(tmp_path / "back") == files_below(store.root)


def test_every_state_is_that_of_a_plain_pass_over_what_was_known(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    store, whole = align(other, anchor, tmp_path / "b"), Store.open(anchor)
    encoder = Encoder(other.tokenizer)
    texts = {
        row["id"]: row.get("text") or row.get("prompt", "") + row.get("completion", "")
        for row in ROWS
    }
    checked = 0
    for index in range(store.num_samples):
        mine, theirs = store.read_sample(index), whole.read_sample(index, taps=[])
        assert mine.id == theirs.id
        for name in ("tokens", "loss_mask", "char_end"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        unit, first = divmod(int(store.sample_starts[index]), store.unit_tokens)
        trees = read_alignment(store.root, store.manifest, unit)
        for row, end in enumerate(mine.char_end.tolist()):
            at = first + row
            for tap, node in (("final", trees.exact[at]), ("stable", trees.stable[at])):
                path = []
                while node >= 0:
                    path.append(int(trees.tokens[node]))
                    node = trees.parents[node]
                if not path:
                    assert not mine.hidden[tap][row].any()
                    continue
                ids = torch.tensor([path[::-1]])
                expected = capture(other, ["final", "layer.1"], ids)
                assert np.allclose(mine.hidden[tap][row], expected["final"][0, -1], atol=1e-5)
                if tap == "final":
                    layer = expected["layer.1"][0, -1]
                    assert np.allclose(mine.hidden["layer.1"][row], layer, atol=1e-5)
                    if mine.id in ("code", "words", "emoji"):
                        known = texts[mine.id][: end - (not trees.is_whole[at])]
                        assert path[::-1] == encoder.encode(known).ids.tolist()
                        checked += 1
    assert checked > 80


def test_later_edits_change_no_earlier_state(anchor: Path, other: Base, tmp_path: Path) -> None:
    tokenizer = str(anchor.parent / "base")
    text = ROWS[0]["text"]
    edited = text[:60] + "idening \U0001f600" + text[75:]
    states = []
    for number, each in enumerate((text, edited)):
        rows = [{"id": "one", "text": each}]
        root = tmp_path / f"a{number}"
        with small_pieces():
            extract(
                base=tokenizer,
                data=write(rows, tmp_path / f"d{number}"),
                out=root,
                store=SETTINGS,
                forward=FORWARD,
            )
        store = align(other, root, tmp_path / f"b{number}", rows)
        states.append(store.read_sample(0))
    first, second = states
    same = first.tokens[:40] == second.tokens[:40]
    count = int(np.argmin(same & (first.char_end[:40] <= 60) & (second.char_end[:40] <= 60)))
    assert count > 12
    for tap in ("final", "layer.1", "stable"):
        assert np.allclose(first.hidden[tap][:count], second.hidden[tap][:count], atol=1e-5)
    assert not np.allclose(
        first.hidden["final"][: count + 9], second.hidden["final"][: count + 9], atol=1e-5
    )


def test_an_aligned_store_says_so_and_is_not_trained_alone(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    store = align(other, anchor, tmp_path / "b")
    assert store.manifest.alignment["anchor"] == Store.open(anchor).fingerprint
    assert store.taps == ["layer.1", "final", "stable"]
    assert verify(tmp_path / "b", depth="full").is_complete
    with pytest.raises(InputError, match="aligned to the store"):
        Store.open(tmp_path / "b")
    with pytest.raises(InputError, match="aligned to the store"):
        align(other, tmp_path / "b", tmp_path / "c")


def test_an_aligned_store_is_not_appended_to(anchor: Path, other: Base, tmp_path: Path) -> None:
    align(other, anchor, tmp_path / "b")
    before = (tmp_path / "b" / "zarr.json").read_bytes()
    data = write([{"id": "new", "text": "more"}], tmp_path / "new")
    for append in (True, False):
        with pytest.raises(InputError, match="expected a store of its own, got one that is align"):
            extract(
                base=other,
                data=data,
                out=tmp_path / "b",
                store=SETTINGS,
                forward=FORWARD,
                append=append,
            )
    assert (tmp_path / "b" / "zarr.json").read_bytes() == before
    assert verify(tmp_path / "b", depth="full").is_complete


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"corpus": CorpusSettings(max_tokens=100)}, "--max-tokens: expected 256, .* got 100"),
        ({"corpus": CorpusSettings(mask="all")}, "--mask: expected auto, .* got all"),
        ({"store": replace(SETTINGS, unit_tokens=128)}, "--unit-tokens: expected 256, .* got 128"),
        ({"store": replace(SETTINGS, seed=3)}, "--seed: expected 0, .* got 3"),
    ],
)
def test_settings_that_are_the_anchors_are_not_dropped_without_a_word(
    anchor: Path, other: Base, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        align(other, anchor, tmp_path / "b", **options)
    same = CorpusSettings(max_tokens=256)
    assert align(other, anchor, tmp_path / "b", corpus=same).num_samples == len(ROWS)


def test_drop_missing_is_not_ignored_in_a_store_of_its_own(other: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drop_missing: expected align_to"):
        extract(base=other, data=ROWS, out=tmp_path / "b", forward=FORWARD, drop_missing=True)


def test_a_second_run_with_another_alignment_is_refused(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    align(other, anchor, tmp_path / "b")
    before = _states(tmp_path / "b")
    with pytest.raises(SettingMismatchError, match="alignment: digest: expected"):
        align(other, anchor, tmp_path / "b", ROWS[1:], drop_missing=True)
    assert _states(tmp_path / "b") == before


def test_an_anchor_that_is_aligned_itself_is_refused(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    align(other, anchor, tmp_path / "b")
    with pytest.raises(InputError, match="^--align-to .*one that is aligned to") as caught:
        align(other, tmp_path / "b", tmp_path / "c")
    assert "--store" not in str(caught.value)


def test_the_first_part_of_a_store_is_an_anchor_and_a_later_one_is_refused(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    more = [{"id": f"more-{row['id']}", "text": "some words and more"} for row in ROWS]
    base, grown = str(anchor.parent / "base"), tmp_path / "grown"
    shutil.copytree(anchor, grown)
    data = write(more, tmp_path / "more")
    with small_pieces():
        extract(base=base, data=data, out=grown, store=SETTINGS, forward=FORWARD, append=True)
    store = align(other, f"{grown}#1", tmp_path / "b")
    assert store.manifest.alignment["anchor"] == Store.open(anchor).fingerprint
    assert _states(tmp_path / "b") == _states(align(other, anchor, tmp_path / "c").root)
    with pytest.raises(InputError, match=r"^--align-to .*#2: expected .* got a later part"):
        align(other, f"{grown}#2", tmp_path / "d", more)


def test_text_that_tokens_do_not_prove_is_taken_from_the_anchors_own_files_only(
    other: Base, tmp_path: Path
) -> None:
    rows, changed = ([{"id": "x", "text": f"a{char}b and more"}] for char in "\x04\x06")
    base = make_base(tmp_path / "base", "lossy", max_position_embeddings=512)
    data = write(rows, tmp_path / "data")
    with small_pieces():
        extract(base=str(base), data=data, out=tmp_path / "a", store=SETTINGS, forward=FORWARD)
    with pytest.raises(InputError, match=r"sample 'x'.*U\+0006"):
        align(other, tmp_path / "a", tmp_path / "b", changed)
    assert len(align(other, tmp_path / "a", tmp_path / "c", rows)) == 1


def test_a_sample_longer_than_the_context_is_named(anchor: Path, tmp_path: Path) -> None:
    path = make_base(tmp_path / "o", "qwen", max_position_embeddings=24)
    short = load_base(str(path), forward=FORWARD)
    with pytest.raises(InputError, match="sample 'code': expected at most 24 tokens, the context"):
        align(short, anchor, tmp_path / "b")


def test_a_plan_larger_than_the_limit_is_refused_before_it_is_written(
    anchor: Path, other: Base, tmp_path: Path
) -> None:
    with small_pieces(), pytest.raises(InputError, match="max_disk: expected more than"):
        extract(
            base=other,
            data=write(ROWS, tmp_path / "data"),
            align_to=anchor,
            out=tmp_path / "b",
            store=SETTINGS,
            forward=FORWARD,
            max_disk_bytes=1000,
        )
    assert not (tmp_path / "b" / "head").exists()


def test_an_aligned_store_stopped_by_its_limit_is_opened_unfinished_with_a_warning(
    anchor: Path, other: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "b"
    align(other, anchor, root)
    (root / receipt_path(0)).unlink()
    (root / shard_path("final", 0)).unlink()
    limit = sum(map(len, files_below(root).values())) + 100
    given: dict[str, Any] = {"store": SETTINGS, "forward": FORWARD, "max_disk_bytes": limit}
    data = write(ROWS, tmp_path / "data")
    with small_pieces(), caplog.at_level(logging.WARNING):
        store = extract(base=other, data=data, align_to=anchor, out=root, **given)
    assert 0 not in store.finished_units
    assert f"stopped at max_disk_bytes={limit}" in caplog.text


def test_other_data_are_refused_by_name(anchor: Path, other: Base, tmp_path: Path) -> None:
    changed = [{**ROWS[0], "text": ROWS[0]["text"].replace("width", "depth")}, *ROWS[1:]]
    with pytest.raises(InputError, match="sample 'code': expected the text that"):
        align(other, anchor, tmp_path / "b", changed)
    with pytest.raises(InputError, match="sample 'new': expected samples of"):
        align(other, anchor, tmp_path / "b", [*ROWS, {"id": "new", "text": "more"}])
    with pytest.raises(InputError, match="sample 'words': expected all 5 samples"):
        align(other, anchor, tmp_path / "b", [ROWS[0], *ROWS[2:]])
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


def test_missing_samples_are_dropped_when_asked(anchor: Path, other: Base, tmp_path: Path) -> None:
    store = align(other, anchor, tmp_path / "b", [ROWS[0], *ROWS[2:]], drop_missing=True)
    assert store.manifest.alignment["missing_samples"] == 1
    assert not store.read_sample("words").hidden["final"].any()
    assert store.read_sample("code").hidden["final"].all(axis=1).all()
    assert verify(tmp_path / "b", depth="full").is_complete


def test_resume_and_repair_give_the_same_bits(anchor: Path, other: Base, tmp_path: Path) -> None:
    align(other, anchor, tmp_path / "whole")
    with small_pieces():
        plan = plan_aligned(
            base=other,
            data=write(ROWS, tmp_path / "data"),
            align_to=anchor,
            out=tmp_path / "b",
            store=SETTINGS,
            forward=FORWARD,
        )
        run_aligned(plan)
    expected = _states(tmp_path / "whole")
    for path in list((tmp_path / "b" / "units").glob("*.json"))[-1:]:
        if path.name != "zarr.json":
            path.unlink()
    align(other, anchor, tmp_path / "b")
    assert _states(tmp_path / "b") == expected
    shard = tmp_path / "b" / "hidden" / "stable" / "c" / "0" / "0"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with small_pieces():
        assert repair(tmp_path / "b", base=other, forward=FORWARD).is_complete
    assert _states(tmp_path / "b") == expected
    with pytest.raises(SettingMismatchError):
        align(other, anchor, tmp_path / "b", store=replace(SETTINGS, taps=["final"]))


HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
}
"""Architectures that carry a state past a mask, or take none."""


@pytest.mark.parametrize(
    "family", ["gemma2", "gemma3", "qwen2", "qwen3", "gpt2", "opt", "phi", "mixtral", *HYBRIDS]
)
def test_architectures_are_exact_or_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in HYBRIDS:
        plain = {} if family == "mamba" else FAMILIES["llama"].settings
        recipe = Family(model_type=family, settings={**plain, **HYBRIDS[family]})
        monkeypatch.setitem(FAMILIES, family, recipe)
    base = load_base(str(make_base(tmp_path / family, "qwen", family)), forward=FORWARD)
    if family in HYBRIDS:
        problem = "got .* with (states that are off by|[A-Za-z]*Error: )"
        with pytest.raises(InputError, match=problem):
            check_tree_forward(base)
        return
    check_tree_forward(base)
    draw = np.random.default_rng(0)
    branches = [draw.integers(-1, node) for node in range(24, 40)]
    parents = np.array([*range(-1, 23), *branches], dtype=np.int32)
    tokens = torch.from_numpy(draw.integers(0, 300, len(parents)))
    states = capture(base, ["final"], tokens[None], tree_inputs(base, [parents]))["final"][0]
    for node, seen in enumerate(visible(parents)):
        path = tokens[torch.from_numpy(seen)]
        expected = capture(base, ["final"], path[None])["final"][0, -1]
        assert torch.allclose(states[node], expected, atol=1e-4), node


def _states(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("hidden", "aligned")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def test_manifests_of_plain_stores_say_nothing_of_alignment(anchor: Path) -> None:
    document = json.loads((anchor / "zarr.json").read_text())
    assert "alignment" not in document["attributes"]["carryon"]
