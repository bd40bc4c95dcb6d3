"""Extract the texts of a lineage into its growing store, and find them again later."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carryon.cache.corpus.sources import describe_file, list_files
from carryon.cache.errors import InputError
from carryon.cache.files import write_json
from carryon.cache.format.manifest import CorpusPart, manifest_path, read_manifest
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage_dir import Lineage, refuse_changed_base
from carryon.train.kinds import get_kind
from carryon.train.modules.taps import resolve_taps, stream_taps


def extract_texts(
    lineage: Lineage,
    data: Sequence[str],
    *,
    base: str,
    stores: Sequence[str],
    settings: TrainSettings,
) -> None:
    """Extract texts into a store as its next part; texts that are already a part are skipped.

    An existing store keeps its settings. A new one gets the taps and blocks that the carry-on
    reads, and defaults for the rest.

    Args:
        lineage: the lineage, whose base must be the same.
        data: files of the texts, or folders of such files.
        base: hub id, folder or .gguf file.
        stores: folder of one store, created if missing.
        settings: settings of the lineage.

    Raises:
        InputError: another base, more than one store, or an error of `extract`.
    """
    from carryon.cache.base.model import load_base
    from carryon.cache.extraction.pipeline import extract

    if not base:
        raise InputError("base: expected the base that extracts --data, got none")
    if len(stores) != 1:
        raise InputError(f"store: expected one, to which --data is appended, got {len(stores)}")
    root = Path(stores[0])
    old = read_manifest(root) if manifest_path(root).exists() else None
    facts = {name: old.forward[name] for name in ("compute_dtype", "attention")} if old else {}
    loaded = load_base(base, forward=ForwardSettings(device=settings.run.device, **facts))
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
    remember_texts(lineage.root, data)
    forward = ForwardSettings(device=settings.run.device)
    extract(base=loaded, data=data, out=root, append=old is not None, forward=forward, **given)


def remember_texts(root: Path, data: Sequence[str]) -> None:
    """Record the paths of texts in LINEAGE/texts.json, so that another base can extract them."""
    digests = {describe_file(file)["sha256"]: str(file.resolve()) for file in list_files(data)}
    write_json(root / "texts.json", _known_texts(root) | digests)


def find_texts(root: Path, parts: Sequence[CorpusPart]) -> list[str]:
    """Return the files that parts of a store were extracted from.

    Raises:
        InputError: names those that were moved or changed.
    """
    known = _known_texts(root)
    paths: list[str] = []
    missing: list[str] = []
    for file in (file for part in parts for file in part.files):
        path = Path(known.get(file["sha256"], ""))
        is_same = path.is_file() and describe_file(path)["sha256"] == file["sha256"]
        (paths if is_same else missing).append(str(path) if is_same else file["name"])
    if missing or not paths:
        raise InputError(
            f"{root}: expected the unchanged texts of its increments, to extract them again; not "
            f"found: {', '.join(missing) or 'any'}. Fix: give them with --data"
        )
    return paths


def _known_texts(root: Path) -> dict[str, str]:
    path = root / "texts.json"
    known: dict[str, str] = json.loads(path.read_text("ascii")) if path.exists() else {}
    return known
