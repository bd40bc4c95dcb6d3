"""Find the data of a lineage's increments, compared with the fingerprints on record."""

from carryon.cache.errors import InputError, MissingError
from carryon.cache.format.manifest import manifest_path, read_manifest
from carryon.cache.store.reader import split_name
from carryon.train.continual.lineage_dir import Lineage

_SHOWN = 12  # of the 64 digits of a fingerprint


def data_of(lineage: Lineage, number: int) -> list[str]:
    """Return STORE#NUMBER of each part of an increment, counted from 1, each with its old content.

    Raises:
        MissingError: a store does not exist.
        InputError: other data lie at its path now.
    """
    increment, stores = lineage.increments[number - 1], []
    for recorded, expected in zip(increment.stores, increment.fingerprints, strict=True):
        store = _moved(lineage, recorded, expected)
        wanted = (
            f"expected the data of increment {number} of the lineage {lineage.root} "
            f"(fingerprint {expected[:_SHOWN]})"
        )
        found = fingerprint_of(store)
        if found is None:
            raise MissingError(
                f"{store}: {wanted}, found none. Fix: put that store back there, or extract its "
                "texts to that folder again"
            )
        if found != expected:
            raise InputError(
                f"{store}: {wanted}, got other data (fingerprint {found[:_SHOWN]}). Fix: put the "
                "old store back there, and extract new texts to a folder of their own"
            )
        stores.append(store)
    return stores


def _moved(lineage: Lineage, store: str, fingerprint: str) -> str:
    """Return the part of the lineage's own store that an older lineage.json named absolutely.

    Such a lineage may have been moved since. A part that is not found there keeps its name.
    """
    own = f"{lineage.store.resolve()}#{store.rpartition('#')[2]}"
    is_found = own == store or fingerprint_of(store) == fingerprint
    return store if is_found or fingerprint_of(own) != fingerprint else own


def fingerprint_of(store: str) -> str | None:
    """Return the fingerprint of a STORE#NUMBER; None if there is no such store or part.

    Raises:
        StoreError: the store is damaged.
    """
    folder, number = split_name(store)
    if not manifest_path(folder).exists():
        return None
    manifest = read_manifest(folder)
    if number is not None:
        if number > len(manifest.parts):
            return None
        manifest = manifest.of_part(number, name=str(folder))
    return manifest.fingerprint
