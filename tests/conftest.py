"""Fixtures shared by all tests: tiny bases."""

from pathlib import Path

import pytest
from tiny_bases import make_tiny_base

from carryon.cache.base import Base, load_base
from carryon.cache.spec import ForwardSettings


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama in bfloat16: width 16, 2 blocks, byte-level tokenizer, chat template."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> Base:
    """The same base, loaded to compute in float32 on the CPU."""
    return load_base(
        str(tiny_base_folder), forward=ForwardSettings(device="cpu", compute_dtype="float32")
    )
