"""Texts of a lineage: extracted by its base into its growing store, and found again later."""

import json
from collections.abc import Sequence
from pathlib import Path

from carryon.cache.corpus.files import describe_file, list_files
from carryon.cache.errors import InputError
from carryon.cache.files import write_json
from carryon.cache.format.manifest import CorpusPart, manifest_path, read_manifest
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage_dir import Lineage, refuse_changed_base
from carryon.train.kinds import get_kind
from carryon.train.modules.taps import resolve_taps, stream_taps


def extract_text(
    lineage: Lineage,
    data: Sequence[str],
    *,
    base: str,
    stores: Sequence[str],
    settings: TrainSettings,
) -> None:
    """Extract texts into the lineage's store, as its next part; what is there is not done again.

    A store that is there is appended to with its own settings; a new one gets the taps that the
    carry-on reads, and else the defaults.

    Args:
        lineage: whose base is to be the same.
        data: files of the texts, or folders of such files.
        base: hub id, folder or .gguf file.
        stores: a single one, made if missing.
        settings: of the lineage.

    Raises:
        InputError: another base, more than one store, or what `extract` refuses.
    """
    from carryon.cache.base.model import load_base
    from carryon.cache.extraction.pipeline import extract

    if not base:
        raise InputError("base: expected the base that is to extract --data, got none")
    if len(stores) != 1:
        raise InputError(f"store: expected one that --data is appended to, got {' '.join(stores)}")
    root = Path(stores[0])
    is_there = manifest_path(root).exists()
    device = settings.run.device
    if is_there:
        old = read_manifest(root)
        facts = {name: old.forward[name] for name in ("compute_dtype", "attention")}
        loaded = load_base(base, forward=ForwardSettings(device=device, **facts))
        store, corpus = StoreSettings.from_dict(old.settings), CorpusSettings.from_dict(old.corpus)
    else:
        loaded = load_base(base, forward=ForwardSettings(device=device))
        carryon = resolve_taps(settings.carryon, loaded.identity.num_layers)
        store = StoreSettings(
            taps=stream_taps(carryon),
            with_blocks=carryon.blocks if get_kind(carryon.kind).needs_blocks else 0,
        )
        corpus = CorpusSettings()
    if lineage.increments:
        refuse_changed_base(lineage, loaded.identity.to_dict(), name=base)
    remember_texts(lineage.root, data)
    extract(
        base=loaded,
        data=data,
        out=root,
        corpus=corpus,
        store=store,
        forward=ForwardSettings(device=device),
        append=is_there,
    )


def remember_texts(root: Path, data: Sequence[str]) -> None:
    """Write down where files of texts are, for the day on which another base is to read them."""
    path = root / "texts.json"
    known = json.loads(path.read_text("ascii")) if path.exists() else {}
    files = list_files(data)
    known |= {describe_file(file)["sha256"]: str(file.resolve()) for file in files}
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, known)


def find_texts(root: Path, parts: Sequence[CorpusPart]) -> list[str]:
    """Return the files that parts of a store were extracted from, where they still are the same.

    Raises:
        InputError: names those that are not.
    """
    path = root / "texts.json"
    known = json.loads(path.read_text("ascii")) if path.exists() else {}
    found: list[str] = []
    missing: list[str] = []
    for file in (file for part in parts for file in part.files):
        place = Path(known.get(file["sha256"], ""))
        is_same = place.is_file() and describe_file(place)["sha256"] == file["sha256"]
        (found if is_same else missing).append(str(place) if is_same else file["name"])
    if missing or not found:
        raise InputError(
            f"{root}: expected the texts of its increments where they were, unchanged, to extract "
            f"them again; not found: {', '.join(missing) or 'any'}: give them with --data"
        )
    return found
