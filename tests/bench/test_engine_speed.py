"""Benchmarks of extraction by vLLM: errors between stores, and a skip that is said."""

from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import write_corpus

from carryon.cache.base.model import Base
from carryon.cache.extraction.pipeline import extract
from carryon.tools.bench.__main__ import main
from carryon.tools.bench.exchange.engine import relative_errors


def test_errors_are_those_of_each_token(tiny_base: Base, store_tmp: Path) -> None:
    data = [str(write_corpus(store_tmp / "texts.jsonl", num_samples=6))]
    taps = ["final", "layer.1"]
    exact, rounded = (
        extract(base=tiny_base, data=data, out=store_tmp / dtype, taps=taps, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert all((errors == 0).all() for errors in relative_errors(exact, exact).values())
    found = relative_errors(exact, rounded)
    assert list(found) == taps
    for errors in found.values():
        assert len(errors) == exact.num_tokens
        assert 2**-12 < np.median(errors) < errors.max() < 2**-8


def test_without_vllm_its_benchmarks_say_that_they_are_skipped(
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CARRYON_VLLM_PYTHON", "/no/python")
    assert main(["vllm", "--quick", "--base", str(tiny_base_folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in ("vllm.speed", "vllm.states"):
        assert f"{name}: skipped, CARRYON_VLLM_PYTHON: expected the Python" in captured.err
