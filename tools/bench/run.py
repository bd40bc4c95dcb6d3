"""Which measurement needs what: stores, a base, made-up states; and running those that can be."""

import logging
from pathlib import Path

from carryon.cache.base.model import Base, load_base
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.decode import measure_decoding
from carryon.tools.bench.deepspec import deepspec, raw_map_straight
from carryon.tools.bench.extract import measure_extraction, samples_of
from carryon.tools.bench.open import measure_opening
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.settings import BenchSettings, BenchSizes, split_label
from carryon.tools.bench.size import measure_lossless, measure_profiles
from carryon.tools.bench.specforge import specforge
from carryon.tools.bench.speculators import speculators
from carryon.tools.bench.states import StateSet, make_states, take_states
from carryon.tools.bench.stream import measure_streaming
from carryon.tools.bench.write import measure_write_growth
from carryon.tools.compare.corpora import write_named_corpus
from carryon.tools.compare.figure import Report

logger = logging.getLogger(__name__)

MADE_UP = "synthetic"
_OWN_CORPUS_TOKENS = 1024  # longest sample of a corpus that is made here
_WRITE_ROUNDS = 10  # times the rounds of the rest: a unit takes milliseconds, the disk its time


def run_benchmarks(
    settings: BenchSettings, sizes: BenchSizes, work: Path, *, report: Report
) -> None:
    """Measure what is asked for and what can be; say on stderr what is left out."""
    wanted = set(settings.figures)
    forward = ForwardSettings()
    base = load_base(settings.base, forward=forward) if settings.base else None
    stores = {label: Store.open(path) for label, path in map(split_label, settings.store)}
    if base is not None and wanted & {"lossless", "profiles", "extract", "stream", "decode"}:
        stores |= _extract_corpora(base, settings, sizes, work, known=set(stores), forward=forward)
    for figure, need in (("lossless", stores), ("profiles", stores), ("extract", base)):
        if figure in wanted and not need:
            option = "--base" if figure == "extract" else "--store or --base"
            logger.info(f"{figure}: left out, it needs {option}")

    for label, store in stores.items():
        if "lossless" in wanted:
            measure_lossless(label, store, report=report)
        if "profiles" in wanted:
            measure_profiles(label, store, report=report)
    if "extract" in wanted and base is not None and stores:
        samples = samples_of(next(iter(stores.values())), max_tokens=sizes.extract_tokens)
        measure_extraction(
            base,
            samples,
            work,
            unit_tokens=sizes.extract_unit_tokens,
            batch_tokens=forward.batch_tokens,
            report=report,
        )
    if "stream" in wanted:
        _measure_streams(stores, sizes, work, report=report)
    if "decode" in wanted:
        _measure_decoders(stores, sizes, work, report=report)
    if "write" in wanted:
        measure_write_growth(
            work,
            early_unit=sizes.early_unit,
            late_unit=sizes.late_unit,
            width=256,
            rounds=_WRITE_ROUNDS * sizes.rounds,
            report=report,
        )
    if "open" in wanted:
        measure_opening(
            work,
            num_units=sizes.large_units,
            num_samples=sizes.large_samples,
            rounds=sizes.rounds,
            report=report,
        )


def _extract_corpora(
    base: Base,
    settings: BenchSettings,
    sizes: BenchSizes,
    work: Path,
    *,
    known: set[str],
    forward: ForwardSettings,
) -> dict[str, Store]:
    stores = {}
    for given in settings.corpus:
        label, path = split_label(given)
        if label in known:
            continue
        corpus = CorpusSettings()
        if "=" not in given:
            path = str(work / f"{label}.jsonl")
            write_named_corpus(label, Path(path), num_tokens=sizes.corpus_tokens)
            limit = min(_OWN_CORPUS_TOKENS, base.identity.context_tokens)
            corpus = CorpusSettings(long="split", max_tokens=limit)
        out = work / f"corpus-{label}"
        extract(
            base=base, data=[path], out=out, corpus=corpus, store=StoreSettings(), forward=forward
        )
        stores[label] = Store.open(out)
    return stores


def _measure_streams(
    stores: dict[str, Store], sizes: BenchSizes, work: Path, *, report: Report
) -> None:
    peers = [
        speculators(),
        specforge(has_pads=False),
        specforge(has_pads=True),
        deepspec(),
        raw_map_straight(),
    ]
    sets = [(_made_up(sizes, num_samples=sizes.samples), sizes.unit_tokens)]
    for label, store in stores.items():
        states = take_states(label, store, max_tokens=sizes.stream_tokens)
        sets.append((states, store.manifest.unit_tokens))
    while sets:
        states, unit_tokens = sets.pop(0)
        measure_streaming(
            states,
            peers,
            work / f"stream-{states.name}",
            unit_tokens=unit_tokens,
            rounds=sizes.rounds,
            thread_counts=sizes.threads,
            slow_mb_per_second=sizes.slow_disk,
            report=report,
        )


def _measure_decoders(
    stores: dict[str, Store], sizes: BenchSizes, work: Path, *, report: Report
) -> None:
    num_samples = max(1, sizes.unit_tokens // sizes.mean_tokens)  # a unit, or a little more
    states = _made_up(sizes, num_samples=num_samples)
    for profile in ("exact", "near", "compact"):
        settings = StoreSettings.from_dict(
            {"taps": states.taps, "profile": profile, "unit_tokens": sizes.unit_tokens}
        )
        root = work / f"decode-{profile}"
        write_scratch_store(root, states, settings=settings)
        measure_decoding(
            MADE_UP if profile == "exact" else f"{MADE_UP}.{profile}",
            root,
            rounds=4 * sizes.rounds,
            report=report,
        )
    for label, store in stores.items():
        measure_decoding(label, store.root, rounds=4 * sizes.rounds, report=report)


def _made_up(sizes: BenchSizes, *, num_samples: int) -> StateSet:
    return make_states(
        MADE_UP,
        num_samples=num_samples,
        width=sizes.width,
        num_taps=sizes.taps,
        mean_tokens=sizes.mean_tokens,
        max_tokens=sizes.max_tokens,
        seed=0,
    )
