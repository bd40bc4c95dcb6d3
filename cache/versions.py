"""Versions of the libraries that compute hidden states."""

from functools import cache
from importlib.metadata import version

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "numcodecs", "zarr", "gpt-carry-on")


def library_versions() -> dict[str, str]:
    """Return the installed version of each, by the name of its distribution."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    return tuple((name, version(name)) for name in _LIBRARIES)
