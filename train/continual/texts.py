"""Extract the texts of a lineage into its growing store, and find them again later."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.rows import Source
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import CarryOnError, InputError, KnownDataError
from carryon.cache.files.documents import sealed, write_json
from carryon.cache.format.manifest import CorpusPart, manifest_path, read_manifest
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage_dir import Lineage, refuse_changed_base
from carryon.train.continual.lineage_document import (
    check_texts,
    read_document,
    refuse_folder,
    refuse_link,
)
from carryon.train.kinds import get_kind
from carryon.train.modules.taps import resolve_taps, stream_taps


def extract_texts(
    lineage: Lineage,
    data: Sequence[str],
    *,
    base: str,
    stores: Sequence[str],
    settings: TrainSettings,
    data_settings: DataSettings,
    allow_pickle: bool = False,
) -> list[str]:
    """Extract texts into a store as its next part; texts that are already a part are skipped.

    Returns STORE#NUMBER of the parts that hold the texts.

    An existing store keeps its settings. A new one gets the taps and blocks that the carry-on
    reads, and defaults for the rest.

    Args:
        lineage: the lineage, whose base must be the same.
        data: files of the texts, folders of such files, or hub ids.
        base: hub id, folder or .gguf file.
        stores: folder of one store, created if missing.
        settings: settings of the lineage.
        data_settings: how the data are read.
        allow_pickle: read weights of the base from pickle files too.

    Raises:
        InputError: another base, more than one store, or an error of `extract`.
        KnownDataError: only some of the texts are a part of the store.
    """
    from carryon.cache.base.model import load_base
    from carryon.cache.base.recorded import recorded_forward, tokenizer_of
    from carryon.cache.extraction.pipeline import extract

    if not base:
        raise InputError("base: expected the base that extracts --data, got none")
    if len(stores) != 1:
        raise InputError(f"store: expected one, to which --data is appended, got {len(stores)}")
    root = Path(stores[0])
    old = read_manifest(root) if manifest_path(root).exists() else None
    facts = {name: old.forward[name] for name in ("compute_dtype", "attention")} if old else {}
    forward = ForwardSettings(device=settings.run.device, allow_pickle=allow_pickle)
    like = tokenizer_of(old.base if old else lineage.base)
    forward = recorded_forward(replace(forward, **facts), old.base if old else lineage.base)
    loaded = load_base(base, forward=forward, like=like)
    if lineage.increments:
        refuse_changed_base(lineage, loaded.identity.to_dict(), name=base)
    given: dict[str, Any]
    if old:
        given = {
            "store": StoreSettings.from_dict(old.settings),
            "corpus": CorpusSettings.from_dict(old.corpus),
        }
    else:
        carryon = resolve_taps(settings.carryon, loaded.identity.num_layers)
        needs_blocks = get_kind(carryon.kind).needs_blocks
        given = {"taps": stream_taps(carryon), "with_blocks": carryon.blocks * needs_blocks}
    digests = remember_texts(lineage.root, data, data_settings)
    try:
        extract(
            base=loaded,
            data=data,
            out=root,
            append=old is not None,
            forward=forward,
            data_settings=data_settings,
            **given,
        )
    except KnownDataError:
        held = {file["sha256"] for part in read_manifest(root).parts for file in part.files}
        if held & digests and digests - held:  # the others would be lost without a word
            raise
    parts = read_manifest(root).parts
    names = [
        f"{root}#{number}"
        for number, part in enumerate(parts, 1)
        if any(file["sha256"] in digests for file in part.files)
    ]
    return names or [str(root)]  # equal samples from another file


def remember_texts(root: Path, data: Sequence[str], settings: DataSettings) -> set[str]:
    """Record where texts are in LINEAGE/texts.json, so that another base can extract them.

    Returns their digests.
    """
    sources = open_sources(data, settings, folder=cache_folder())
    found = {source.sha256: _place(source, root) for source in sources}
    write_json(root / "texts.json", sealed(_known_texts(root) | found))
    return set(found)


def find_texts(root: Path, parts: Sequence[CorpusPart], settings: DataSettings) -> list[str]:
    """Return the files, and data sets on the hub, that parts of a store were extracted from.

    Raises:
        InputError: names those that were moved or changed.
    """
    known = _known_texts(root)
    places: list[str] = []
    missing: list[str] = []
    for file in (file for part in parts for file in part.files):
        place = known.get(file["sha256"], "")
        place = place and _absolute(place, root)
        is_same = place and file["sha256"] in _digests(place, settings)
        (places if is_same else missing).append(place if is_same else file["name"])
    if missing or not places:
        raise InputError(
            f"{root}: expected the unchanged texts of its increments, to extract them again; not "
            f"found: {', '.join(missing) or 'any'}. Fix: give them with --data"
        )
    return places


def _place(source: Source, root: Path) -> str:
    """Return where a source is: `./` and a path in the lineage, an absolute path, or a hub name."""
    path = Path(source.name)
    if not path.exists():
        return source.name
    absolute = path.resolve()
    if absolute.is_relative_to(root.resolve()):  # the lineage may be moved
        return f"./{absolute.relative_to(root.resolve()).as_posix()}"
    return str(absolute)


def _absolute(place: str, root: Path) -> str:
    if not place.startswith("./"):
        return place
    path = root.resolve() / place
    refuse_link(root.resolve(), path.parent)
    refuse_folder(path)
    return str(path)


def _digests(place: str, settings: DataSettings) -> set[str]:
    """Return the digests of the sources at a place; none if it cannot be read."""
    try:
        return {source.sha256 for source in open_sources(place, settings, folder=cache_folder())}
    except CarryOnError:
        return set()


def _known_texts(root: Path) -> dict[str, str]:
    path = root / "texts.json"
    return check_texts(read_document(path), path=path) if os.path.lexists(path) else {}
