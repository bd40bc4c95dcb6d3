"""Versions of the libraries that compute hidden states."""

from functools import cache
from importlib.metadata import version

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "numcodecs", "zarr", "gpt-carry-on")

installed_version = cache(version)
"""Return the installed version of a distribution; its files are read once in a process."""


def library_versions() -> dict[str, str]:
    """Return the installed version of each, by the name of its distribution."""
    return {name: installed_version(name) for name in _LIBRARIES}
