"""Start a lineage on an updated base, from the newest version of a lineage on the old base.

Hidden states are specific to a base, so a new base starts a new store and lineage; the old lineage
is not changed. The first increment is all text that the old lineage has seen, with the same samples
held out. Weights of the old carry-on are copied where name and shape are the same: all of them for
a base of the same width D, else those of the body of width d.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.base.model import load_base
from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import InputError, MissingError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.train.config import TrainSettings
from carryon.train.continual.increment_data import data_of
from carryon.train.continual.lineage import (
    add_increment,
    open_or_start,
    release_from_scratch,
    release_newest,
    resolve_settings,
)
from carryon.train.continual.lineage_dir import (
    Lineage,
    changes,
    lock_lineage,
    open_lineage,
    settings_of,
    write_lineage,
)
from carryon.train.continual.texts import find_texts, remember_texts
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.kinds import get_kind
from carryon.train.losses.frozen_head import place_head
from carryon.train.modules.carryon import build_carryon
from carryon.train.modules.serialization import load_carryon
from carryon.train.modules.taps import stream_taps
from carryon.train.optim.optimizer import apply_memory_settings, build_optimizer
from carryon.train.trainer.checkpoint import START, save_checkpoint
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import measure_nlls

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RebaseReport:
    """Losses of the first version on a new base; all in nats per held-out supervised token."""

    carryon: str
    """Folder of the version."""
    old_lineage: str
    old_version: int
    """Version of the old lineage that it starts from."""
    kept_weights: int
    """Values copied from that version; the others, `new_weights`, have another shape."""
    new_weights: int
    steps: int
    base_nll: float
    """Loss of the new base alone."""
    start_nll: float
    """Loss with the copied weights, before the first step."""
    from_old_nll: float
    """Loss of the version."""
    from_scratch_nll: float | None
    """Loss after as many steps from an untrained carry-on. None: not trained."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def rebase(
    lineage: str | Path,
    *,
    old_lineage: str | Path,
    base: str | Path,
    settings: TrainSettings | None = None,
    data: Sequence[str] = (),
    data_settings: DataSettings | None = None,
    alpha: float | None = None,
    also_from_scratch: bool = False,
    allow_pickle: bool = False,
) -> RebaseReport:
    """Extract an old lineage's texts with a new base, and release a first version from it.

    The same call resumes an interrupted one; if finished, it returns the report.

    Args:
        lineage: folder of the new lineage; created if missing.
        old_lineage: folder of the old one, whose stores still exist; it is not changed.
        base: the new base: hub id, folder or .gguf file.
        settings: settings of the new lineage, with the old carry-on's shape. None: the old ones.
        data: the texts of the old lineage. None given: the data that its updates extracted.
        data_settings: how the texts are read. None: defaults.
        alpha: fraction of an increment's steps in which a branch decays. None: the old one.
        also_from_scratch: also train an untrained carry-on over the same steps, to compare.
        allow_pickle: read weights of the base from pickle files too.

    Raises:
        InputError: the base is the old one, texts were moved or changed, or no shape fits.
        MissingError: the old lineage, its stores or its versions do not exist.
        StoreBusyError: another process writes to the new lineage.
    """
    old = open_lineage(old_lineage)
    if not old.released:
        raise MissingError(f"{old.root}: expected a released version, found none: carryon update")
    settings = settings or settings_of(old)
    free = {"dropout"}
    if get_kind(settings.carryon.kind).own_tap:  # it depends on the depth of the base
        settings, free = settings.with_options(taps=["final"]), {"dropout", "taps"}
    shape = {name: v for name, v in settings.carryon.to_dict().items() if name not in free}
    if changed := changes({name: old.settings.get(name) for name in shape}, shape):
        raise InputError(
            f"{old.root}: expected a carry-on of the old lineage's shape, got {changed}. Fix: give "
            f"--config {old.root / 'config.yaml'}"
        )
    alpha = old.alpha if alpha is None else alpha
    predecessor = {
        "lineage": str(old.root.resolve()),
        "version": old.released[-1],
        "fingerprints": _fingerprints(old),
    }
    with lock_lineage(lineage):
        new, settings = open_or_start(lineage, settings, alpha=alpha, predecessor=predecessor)
        if not _is_from(new.predecessor or {}, old):
            raise InputError(
                f"{lineage}: expected a new folder, or the lineage that was started from "
                f"{old.root}, got another lineage"
            )
        if not new.increments:
            reading = data_settings or DataSettings()
            identity = _extract_again(
                new, old, str(base), data, settings, reading, allow_pickle=allow_pickle
            )
            settings = resolve_settings(settings, identity)
            part = f"{new.store.resolve()}#1"
            first_data = open_data([part], settings)
            new = replace(new, predecessor=_start_from_old(new, old, first_data, settings))
            new = add_increment(new, [part], settings)
        first = release_newest(replace(new, increments=new.increments[:1]), settings)
        known = dict(new.predecessor or {})
        scratch_nll = known.get("from_scratch_nll")
        if also_from_scratch:
            scratch_nll = release_from_scratch(new, settings).carryon_nll
        known |= {"from_old_nll": first.carryon_nll, "from_scratch_nll": scratch_nll}
        write_lineage(replace(new, predecessor=known))
    losses = ("base_nll", "start_nll", "from_old_nll", "from_scratch_nll")
    return RebaseReport(
        carryon=first.carryon,
        old_lineage=str(old.root.resolve()),
        old_version=known["version"],
        steps=new.increments[0].steps,
        **{name: known[name] for name in ("kept_weights", "new_weights", *losses)},
    )


def _fingerprints(old: Lineage) -> list[str]:
    return [fingerprint for each in old.increments for fingerprint in each.fingerprints]


def _is_from(predecessor: dict[str, Any], old: Lineage) -> bool:
    """Tell whether a lineage was started from an old one, which may be moved or grown since."""
    known = predecessor.get("fingerprints")
    if known is None:  # of an older lineage
        return predecessor.get("lineage") == str(old.root.resolve())
    return bool(known == _fingerprints(old)[: len(known)])


def _extract_again(
    new: Lineage,
    old: Lineage,
    base: str,
    data: Sequence[str],
    settings: TrainSettings,
    data_settings: DataSettings,
    *,
    allow_pickle: bool,
) -> dict[str, Any]:
    """Extract the texts of all increments as one part; return the identity of the new base."""
    stores = [each for i in range(len(old.increments)) for each in data_of(old, i + 1)]
    manifests = [Store.open(store).manifest for store in stores]
    first = manifests[0]
    forward = ForwardSettings(
        device=settings.run.device,
        attention=first.forward["attention"],
        allow_pickle=allow_pickle,
    )
    loaded = load_base(base, forward=forward)
    identity = loaded.identity.to_dict()
    if identity["weights_sha256"] == old.base.get("weights_sha256"):
        raise InputError(
            f"{base}: expected another base than that of {old.root}, got the same weights. Fix: "
            "give new texts with --data and --base instead"
        )
    texts = list(data) or find_texts(
        old.root, [part for each in manifests for part in each.parts], data_settings
    )
    remember_texts(new.root, texts, data_settings)
    # The old limit of tokens, unless it is more than the new base's context.
    corpus = CorpusSettings.from_dict(first.corpus)
    limit = min(corpus.max_tokens, loaded.identity.context_tokens, first.unit_tokens)
    extract(
        base=loaded,
        data=texts,
        out=new.store,
        corpus=replace(corpus, max_tokens=limit),
        store=replace(
            StoreSettings.from_dict(first.settings),
            taps=stream_taps(resolve_settings(settings, identity).carryon),
        ),
        forward=forward,
        data_settings=data_settings,
        held_out=_held_out_ids(stores, settings),
    )
    return identity


def _held_out_ids(stores: Sequence[str], settings: TrainSettings) -> set[str]:
    """Return the ids of all held-out samples: the copied weights were not trained on them."""
    settings = replace(settings, stream=replace(settings.stream, store_weights=[]))
    ids = set()
    for store in stores:
        data = open_data([store], settings)
        ids |= {data.store.sample_id(sample) for sample in data.split.held_out.tolist()}
    return ids


def _start_from_old(
    new: Lineage, old: Lineage, data: TrainData, settings: TrainSettings
) -> dict[str, Any]:
    """Write the checkpoint that the trunk starts from; return what lineage.json records of it."""
    version = old.released[-1]
    folder = old.version(version).carryon
    old_store = Store.open(data_of(old, version)[0])
    before, _ = load_carryon(folder, blocks=old_store.blocks)
    carryon = build_carryon(settings.carryon, data.store, seed=settings.optimization.seed)
    old_weights, weights = before.state_dict(), carryon.state_dict()
    kept = 0
    for name, weight in weights.items():
        if name in old_weights and old_weights[name].shape == weight.shape:
            weight.copy_(old_weights[name])  # state_dict shares memory, without gradients
            kept += weight.numel()
    fresh = sum(weight.numel() for weight in weights.values()) - kept
    if not kept:
        raise InputError(
            f"{folder}: expected weights that fit a carry-on on a base of width "
            f"{data.store.width}, got none. Fix: start another lineage"
        )
    device = pick_device(settings.run.device)
    carryon = apply_memory_settings(carryon.to(device), settings.memory)
    job = EvalJob(
        carryon=carryon,
        head=place_head(data.store, settings.loss, device=device),
        chunk=pick_chunk(settings.loss.chunk_tokens),
        with_base=True,
    )
    [nll] = measure_nlls(data.store, data.split.held_out, [job], stream=data.settings)
    save_checkpoint(  # over that of a killed call, whose settings may have been others
        new.start,
        carryon=carryon,
        optimizer=build_optimizer(carryon, settings.optimization, settings.memory),
        progress=START,
        identity={},
        keep=1,
    )
    logger.info(
        f"{new.root}: {kept} weights of version {version} of {old.root} fit, {fresh} are new; "
        f"held-out NLL of the new base {nll.base:.4f}, with them {nll.carryon:.4f}"
    )
    return {
        "lineage": str(old.root.resolve()),
        "version": version,
        "fingerprints": _fingerprints(old),
        "base": old.base,
        "kept_weights": kept,
        "new_weights": fresh,
        "base_nll": nll.base,
        "start_nll": nll.carryon,
    }
