"""A store keeps its compute dtype: `auto` is what it was planned with, here float32 or not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.aligned_stores import ROWS, make_base, write
from support.tiny_stores import (
    FORWARD,
    SETTINGS,
    SHARING,
    extract_tiny,
    files_below,
    readable_content,
    small_pieces,
)

from carryon.cache.errors import SettingMismatchError
from carryon.cache.extraction.aligned import AlignedPlan, plan_aligned, run_aligned
from carryon.cache.extraction.pipeline import extract, run_extraction
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings

AUTO = replace(FORWARD, compute_dtype="auto")
BFLOAT16 = replace(FORWARD, compute_dtype="bfloat16")


@pytest.fixture
def original(tiny_base_folder: Path, store_data: Path, store_tmp: Path) -> Path:
    """A store that was computed in bfloat16; a new one of so small a base would be in float32."""
    root = store_tmp / "original"
    extract_tiny(str(tiny_base_folder), store_data, root, forward=BFLOAT16)
    extract_tiny(str(tiny_base_folder), store_data, store_tmp / "new", forward=AUTO)
    assert read_manifest(root).forward["compute_dtype"] == "bfloat16"
    assert read_manifest(store_tmp / "new").forward["compute_dtype"] == "float32"
    return root


def test_auto_resumes_in_the_dtype_of_the_store_with_the_same_bits(
    original: Path, tiny_base_folder: Path, store_data: Path
) -> None:
    before = readable_content(original)
    (original / receipt_path(1)).unlink()
    report = extract_tiny(str(tiny_base_folder), store_data, original, forward=AUTO)
    assert report.computed_units == 1
    assert readable_content(original) == before


def test_another_dtype_is_still_refused_when_it_is_given(
    original: Path, tiny_base_folder: Path, store_data: Path
) -> None:
    before = files_below(original)
    with pytest.raises(SettingMismatchError, match="compute_dtype: expected bfloat16, .* float32"):
        extract_tiny(str(tiny_base_folder), store_data, original, forward=FORWARD)
    assert files_below(original) == before


def test_auto_appends_in_the_dtype_of_the_store(
    original: Path, tiny_base_folder: Path, store_data: Path, store_more_data: Path, store_tmp: Path
) -> None:
    base = str(tiny_base_folder)
    extract_tiny(base, store_more_data, original, append=True, forward=AUTO)
    given = store_tmp / "given"
    for data, append in ((store_data, False), (store_more_data, True)):
        extract_tiny(base, data, given, append=append, forward=BFLOAT16)
    assert readable_content(original) == readable_content(given)


def test_processes_that_chose_other_dtypes_compute_in_that_of_the_first_plan(
    original: Path, tiny_base_folder: Path, store_data: Path, store_tmp: Path
) -> None:
    """Both have loaded the base before there was a store."""
    root = store_tmp / "shared"
    with small_pieces():
        late = plan_extraction(
            base=str(tiny_base_folder),
            data=store_data,
            out=root,
            corpus=CorpusSettings(),
            store=SETTINGS,
            forward=AUTO,
            data_settings=DataSettings(),
            is_shared=True,
        )
        assert late.base.compute_dtype == torch.float32
    extract_tiny(str(tiny_base_folder), store_data, root, forward=BFLOAT16, sharing=SHARING)
    (root / receipt_path(1)).unlink()
    with small_pieces():
        report = run_extraction(late, sharing=replace(SHARING, forward=AUTO))
    assert report.is_finished
    assert report.computed_units == 1
    assert readable_content(root) == readable_content(original)


def states_below(root: Path) -> dict[str, bytes]:
    return {name: each for name, each in files_below(root).items() if name.startswith("hidden/")}


def test_an_aligned_store_keeps_its_dtype_too(tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    data = write(ROWS, tmp_path / "data")
    first, other = (
        str(make_base(tmp_path / name, name, max_position_embeddings=512))
        for name in ("gpt2", "qwen")
    )

    def plan_in(out: Path, forward: ForwardSettings) -> AlignedPlan:
        return plan_aligned(
            base=other,
            data=data,
            align_to=anchor,
            out=out,
            store=SETTINGS,
            forward=forward,
            is_shared=True,
        )

    with small_pieces():
        extract(base=first, data=data, out=anchor, store=SETTINGS, forward=FORWARD)
        late = plan_in(tmp_path / "out", AUTO)
        run_aligned(plan_in(tmp_path / "out", BFLOAT16))
        before = states_below(tmp_path / "out")
        for plan in (plan_in(tmp_path / "out", AUTO), late):
            (tmp_path / "out" / receipt_path(0)).unlink()
            report = run_aligned(plan, sharing=replace(SHARING, forward=AUTO))
            assert report.computed_units == 1
            assert states_below(tmp_path / "out") == before
