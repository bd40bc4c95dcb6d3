"""A lineage on an updated base, which begins with what the carry-on has learned on the old one.

Hidden states of another base are other numbers, so the new lineage has its own store, trunk and
versions; the old one stays as it is. Its first increment is all the text that the old one has
seen, with the same samples held out. Weights of the old carry-on are taken wherever the shapes
are the same: all of them for a base of the same width D, else the body of width d, behind a new
bridge and before a new gate and up-projection.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from carryon.cache.base.model import Base, load_base
from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import InputError, MissingError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.format.manifest import Manifest
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.view import open_store
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage import (
    check_branches,
    grow,
    release_anew,
    release_newest,
    settings_on,
)
from carryon.train.continual.lineage_dir import (
    Lineage,
    lasting_settings,
    open_lineage,
    read_lineage,
    refuse_changed_settings,
    write_lineage,
)
from carryon.train.continual.texts import find_texts, remember_texts
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.kinds import get_kind
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.carryon import CarryOn, blocks_of, build_carryon
from carryon.train.modules.serialization import load_carryon
from carryon.train.modules.taps import stream_taps
from carryon.train.optim.optimizer import apply_memory_settings, build_optimizer
from carryon.train.trainer.checkpoint import START, newest_checkpoint, save_checkpoint
from carryon.train.trainer.nll import EvalJob, measure_nlls

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewBaseReport:
    """What the first version on a new base came to, and one begun anew beside it."""

    carryon: str
    """Folder of the version."""
    old_lineage: str
    old_version: int
    """The version of the old lineage that it begins with."""
    kept_weights: int
    """Values taken from it."""
    new_weights: int
    """Values whose shape is another on the new base."""
    steps: int
    """Steps of either."""
    base_nll: float
    """Held-out NLL of the new base alone."""
    start_nll: float
    """With the weights taken over, before any step."""
    from_old_nll: float
    """Of the version."""
    anew_nll: float | None
    """After as many steps from an untrained carry-on; None: not trained."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def begin_on_new_base(
    *,
    lineage: str,
    old_lineage: str,
    base: str,
    settings: TrainSettings,
    data: Sequence[str] = (),
    alpha: float = 0.6,
    also_anew: bool = False,
) -> NewBaseReport:
    """Extract an old lineage's texts with a new base, and release a first version from it.

    Interrupted, the same call goes on; of a finished one the report is returned.

    Args:
        lineage: folder of the new lineage; made if missing.
        old_lineage: folder of the old one, whose stores are still there; nothing in it is changed.
        base: the new base: hub id, folder or .gguf file.
        settings: of the new lineage; the carry-on's shape as in the old one.
        data: the texts of the old lineage. None: where its updates found them.
        alpha: part of an increment's steps in which a branch falls.
        also_anew: train an untrained carry-on as well, over the same steps.

    Raises:
        InputError: the base is the old one, the texts are not where they were, or the shapes
            have nothing in common.
        MissingError: the old lineage, its stores or its versions are not there.
    """
    check_branches(settings)
    old = open_lineage(old_lineage)
    if not old.released:
        raise MissingError(f"{old.root}: expected a released version, found none: carryon update")
    settings = _without_own_tap(settings)
    _refuse_other_shape(old, settings)
    found = read_lineage(lineage)
    if found is None:
        found = Lineage(
            root=Path(lineage),
            base={},
            alpha=alpha,
            settings=lasting_settings(settings),
            increments=[],
            predecessor={"lineage": str(old.root.resolve()), "version": old.released[-1]},
        )
    if (found.predecessor or {}).get("lineage") != str(old.root.resolve()):
        raise InputError(
            f"{lineage}: expected a new folder, or the lineage that was begun from {old.root}, got "
            "another lineage"
        )
    settings = settings_on(found.base, settings)
    refuse_changed_settings(found, settings, alpha=alpha)
    if not found.increments:
        settings = settings_on(_extract_again(found, old, base, data, settings), settings)
        part = f"{found.store.resolve()}#1"
        opened = open_data([part], settings.stream, taps=stream_taps(settings.carryon))
        found = replace(found, predecessor=_begin_with_old(found, old, opened, settings))
        found = grow(found, [part], settings)
    first = release_newest(replace(found, increments=found.increments[:1]), settings)
    anew = release_anew(found, settings) if also_anew else None
    known = found.predecessor or {}
    report = NewBaseReport(
        carryon=first.carryon,
        old_lineage=known["lineage"],
        old_version=known["version"],
        kept_weights=known["kept_weights"],
        new_weights=known["new_weights"],
        steps=found.increments[0].steps,
        base_nll=known["base_nll"],
        start_nll=known["start_nll"],
        from_old_nll=first.carryon_nll,
        anew_nll=anew.carryon_nll if anew else known.get("anew_nll"),
    )
    figures = {"from_old_nll": report.from_old_nll, "anew_nll": report.anew_nll}
    write_lineage(replace(found, predecessor=known | figures))
    return report


def _without_own_tap(settings: TrainSettings) -> TrainSettings:
    """Leave the tap of a kind that has one to the new base, which may have other blocks."""
    carryon = settings.carryon
    if not get_kind(carryon.kind).own_tap:
        return settings
    return replace(settings, carryon=replace(carryon, taps=["final"]))


def _refuse_other_shape(old: Lineage, settings: TrainSettings) -> None:
    free = {"dropout", "taps"} if get_kind(settings.carryon.kind).own_tap else {"dropout"}
    changed = [
        f"{name} {old.settings.get(name)} -> {value}"
        for name, value in settings.carryon.to_dict().items()
        if name not in free and old.settings.get(name) != value
    ]
    if changed:
        raise InputError(
            f"{old.root}: expected a carry-on of the old lineage's shape, got "
            f"{', '.join(changed)}: give --config {old.root / 'config.yaml'}"
        )


def _extract_again(
    found: Lineage, old: Lineage, base: str, data: Sequence[str], settings: TrainSettings
) -> dict[str, Any]:
    """Extract the texts of all increments into the new lineage's store, as one part.

    Returns:
        The identity of the new base.
    """
    stores = [store for increment in old.increments for store in increment.stores]
    manifests = [open_store(store).manifest for store in stores]
    first = manifests[0]
    forward = ForwardSettings(device=settings.run.device, attention=first.forward["attention"])
    loaded = load_base(base, forward=forward)
    if loaded.identity.weights_sha256 == old.base.get("weights_sha256"):
        raise InputError(
            f"{base}: expected another base than that of {old.root}, got the same weights: give "
            "new texts with --data and --base instead"
        )
    parts = [part for manifest in manifests for part in manifest.parts]
    texts = list(data) or find_texts(old.root, parts)
    remember_texts(found.root, texts)
    identity = loaded.identity.to_dict()
    store = StoreSettings.from_dict(first.settings)
    extract(
        base=loaded,
        data=texts,
        out=found.store,
        corpus=_corpus_for(first, loaded),
        store=replace(store, taps=stream_taps(settings_on(identity, settings).carryon)),
        forward=forward,
        held_out=_held_out(stores, settings),
    )
    return identity


def _corpus_for(manifest: Manifest, base: Base) -> CorpusSettings:
    """Return the old corpus settings, without a limit that came from the old base."""
    settings = CorpusSettings.from_dict(manifest.corpus)
    limit = min(base.identity.context_tokens, manifest.unit_tokens)
    return replace(settings, max_tokens=min(settings.max_tokens, limit))


def _held_out(stores: Sequence[str], settings: TrainSettings) -> set[str]:
    """Return the ids of all that was held out: what was trained on before must not come there."""
    alone = replace(settings.stream, store_weights=[])
    ids = set()
    for store in stores:
        data = open_data([store], alone, taps=stream_taps(settings.carryon))
        ids |= {data.store.sample_id(sample) for sample in data.split.held_out.tolist()}
    return ids


def _begin_with_old(
    found: Lineage, old: Lineage, data: TrainData, settings: TrainSettings
) -> dict[str, Any]:
    """Write the step folder that the trunk begins with; returns what it holds."""
    version = old.released[-1]
    place = open_store(old.increments[version - 1].stores[0])
    before, _ = load_carryon(old.version(version).carryon, blocks=partial(blocks_of, place))
    carryon = build_carryon(settings.carryon, data.store, seed=settings.optimization.seed)
    kept, new = _take_over_(carryon, before)
    if not kept:
        raise InputError(
            f"{old.version(version).carryon}: expected weights that fit a carry-on on a base of "
            f"width {data.store.width}, got none: begin another lineage"
        )
    device = pick_device(settings.run.device)
    carryon = apply_memory_settings(carryon.to(device), settings.memory)
    judged = EvalJob(
        carryon=carryon,
        head=place_head(data.store, settings.loss, device=device),
        chunk=pick_chunk(settings.loss.chunk_tokens),
        with_base=True,
    )
    [nll] = measure_nlls(data.store, data.split.held_out, [judged], stream=data.settings)
    if newest_checkpoint(found.start) is None:
        save_checkpoint(
            found.start,
            carryon=carryon,
            optimizer=build_optimizer(carryon, settings.optimization, settings.memory),
            progress=START,
            identity={},
            keep=1,
        )
    logger.info(
        f"{found.root}: {kept} weights of version {version} of {old.root} fit, {new} are new; "
        f"held-out NLL of the new base {nll.base:.4f}, with them {nll.carryon:.4f}"
    )
    return {
        "lineage": str(old.root.resolve()),
        "version": version,
        "base": old.base,
        "kept_weights": kept,
        "new_weights": new,
        "base_nll": nll.base,
        "start_nll": nll.carryon,
    }


def _take_over_(carryon: CarryOn, before: CarryOn) -> tuple[int, int]:
    """Copy what has the same name and shape; returns values copied and left as they are."""
    old = before.state_dict()
    own = dict(carryon.state_dict())
    fitting = {name for name in own if name in old and old[name].shape == own[name].shape}
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(old[name])
    total = sum(weight.numel() for weight in own.values())
    kept = sum(own[name].numel() for name in fitting)
    return kept, total - kept
