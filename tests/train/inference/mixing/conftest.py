"""Mixtures that are trained once for all tests here."""

from pathlib import Path

import pytest
from support.composed import make_mixtures


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, their stores, and two runs of mixtures."""
    return make_mixtures(tmp_path_factory.mktemp("composed"))
