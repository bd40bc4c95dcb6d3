"""The public names of `carryon.cache`, and what is loaded to get them."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_stores import make_given, write_store

import carryon.cache

HEAVY = {"torch", "transformers", "zarr"}


def test_every_public_name_can_be_imported() -> None:
    for name in carryon.cache.__all__:
        assert getattr(carryon.cache, name).__name__ == name
    assert dir(carryon.cache) == carryon.cache.__all__ == sorted(carryon.cache.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Shop'"):
        carryon.cache.Shop  # noqa: B018


@pytest.mark.parametrize(
    "names", ["", "CorpusSettings, DataSettings, StoreSettings, ForwardSettings", "Store", "verify"]
)
def test_a_name_loads_nothing_heavy(names: str) -> None:
    assert HEAVY.isdisjoint(loaded_by(f"from carryon.cache import ({names})" if names else ""))


def test_opening_and_reading_a_store_loads_nothing_heavy(tmp_path: Path) -> None:
    write_store(tmp_path / "store", make_given())
    program = (
        f"from carryon.cache import Store; Store.open({str(tmp_path / 'store')!r}).read_unit(0)"
    )
    assert HEAVY.isdisjoint(loaded_by(program))


def loaded_by(program: str) -> set[str]:
    """Return the modules that are loaded after `program` in a fresh process."""
    program = f"import carryon.cache\n{program}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())
