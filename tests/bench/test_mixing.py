"""The benchmark of mixtures runs on tiny stores; no figure of it is asserted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.aligned_tokenizers import make_tokenizer
from support.benchmarks import measure, names_of
from support.mixed_stores import make_anchor, make_source
from torch import Tensor

from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts
from carryon.cache.corpus.records import Record
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings
from carryon.tools.bench.alignment import PROSE, count_leaks
from carryon.tools.bench.mixed_generation import count_same


def test_a_mixture_is_measured_against_its_parts(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path)
    aligned = make_source(tmp_path, anchor)
    stores = [str(anchor), f"other={aligned}"]

    figures = measure("mixing.train", tmp_path, given_stores=stores)

    assert names_of(figures) == ["mixing.gate_alone", "mixing.gain", "mixing.speed"]
    assert len(figures[1].details["gains"]) == 3
    with pytest.raises(InputError, match="expected the anchor's store and one that is aligned"):
        measure("mixing.train", tmp_path, given_stores=stores[:1])


def test_alignment_is_timed_and_edits_are_counted(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path)
    stores = [str(anchor), str(make_source(tmp_path, anchor))]

    speed = measure("mixing.align", tmp_path, given_stores=stores)
    leaks = measure("mixing.leak", tmp_path, given_stores=stores)

    assert names_of([*speed, *leaks]) == ["mixing.align", "mixing.leak"]
    assert speed[0].details["tokens"] > 1000
    of_all = speed[0].value * speed[0].details["tokens"] / 1e6
    assert of_all == pytest.approx(min(speed[0].details["seconds"]))
    assert leaks[0].value == 0
    assert leaks[0].details["edits"] == 20
    assert leaks[0].details["compared"] > 100
    with pytest.raises(InputError, match="expected a store of each of two bases"):
        measure("mixing.leak", tmp_path, given_stores=stores[:1])


def test_projecting_is_timed_beside_the_products_of_the_heads(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path)
    stores = [str(anchor), str(make_source(tmp_path, anchor))]

    [speed] = measure("mixing.projection", tmp_path, given_stores=stores)

    assert speed.figure == "mixing.projection"
    assert 0 < speed.details["positions"] <= 32
    assert speed.details["products_alone"] > 0
    part = speed.value / speed.details["products_alone"]
    assert speed.details["share_of_products"] == pytest.approx(part)
    with pytest.raises(InputError, match="expected the anchor's store and one that is aligned"):
        measure("mixing.projection", tmp_path, given_stores=stores[:1])


class _Leaky(Aligner):
    """Says at each position how long the text is."""

    def align(self, record: Record) -> Iterator[AlignedSample]:
        for each in super().align(record):
            length = np.full_like(each.tree.covered, each.sample.char_end[-1])
            yield replace(each, tree=replace(each.tree, covered=length))


def test_a_position_that_knows_what_follows_is_counted() -> None:
    readings = [
        BaseTexts(
            make_tokenizer(kind),
            name=kind,
            settings=CorpusSettings(),
            max_tokens=512,
            end_tokens=(),
            vocab_size=None,
        )
        for kind in ("gpt2", "qwen")
    ]
    leaks = count_leaks([_Leaky(*readings)] * 2, PROSE, edits=8)
    assert leaks.changed > 8
    assert "edited at" in leaks.first
    assert count_leaks([Aligner(*readings)] * 2, PROSE, edits=8).changed == 0


class _Forgetful:
    """Generates other tokens for the first row of a batch if it has a cache."""

    device = "cpu"

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer("gpt2")

    def generate(
        self,
        input_ids: Tensor,
        *,
        use_cache: bool,
        max_new_tokens: int,
        **_: Any,  # noqa: ANN401
    ) -> Tensor:
        new = torch.zeros(len(input_ids), max_new_tokens, dtype=torch.int64)
        new[0, -1] = int(use_cache)
        return torch.cat([input_ids, new], dim=1)


def test_answers_that_a_cache_changes_are_counted() -> None:
    texts = ["one", "two words", "three", "four of them", "five"]
    assert count_same(_Forgetful(), texts, rows=2, new_tokens=3) == 2


def test_generation_is_compared_with_and_without_a_cache(tmp_path: Path) -> None:
    sizes = {"prompts": 2, "batch_sizes": (2,), "carryon_bytes": 4096}
    figures = measure("mixing.generation", tmp_path, sizes=sizes)

    assert names_of(figures) == ["mixing.same_text.batch-2", "mixing.generation.batch-2"]
    assert figures[0].value == 1
    assert figures[1].value > 0
    for given, mix in (("base", ()), ("", ("other",))):
        with pytest.raises(InputError, match="expected --base and mix, or neither"):
            measure("mixing.generation", tmp_path, base=given, sizes={"mix": mix})
