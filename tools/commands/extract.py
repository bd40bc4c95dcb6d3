"""`carryon extract`: corpus and base in, store out."""

import json
import logging
import re
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings

if TYPE_CHECKING:
    from carryon.cache.extraction.plan import ExtractionPlan

logger = logging.getLogger(__name__)

UNIT_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def extract(
    *,
    base: str,
    data: list[str],
    out: str,
    append: bool = False,
    max_disk: str = "",
    dry_run: bool = False,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Run a frozen base once over a corpus and keep its hidden states in a store.

    Everything after this needs the store alone. The work is done unit by unit: stop it at any
    time, or let it crash, and the same command goes on where it was. The predicted size is shown
    first; the last line on stdout is a JSON line with what was done.

    Data are JSON lines (.jsonl) or Parquet files with records of `messages`, `prompt` and
    `completion`, or `text`, or plain text files. A record may have an `id` and a `split`, which
    is `train` or `held-out`.

    Example:
        carryon extract --base HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --out store

    Args:
        base: The frozen base: hub id (NAME/REPO or NAME/REPO@REVISION), folder or .gguf file.
        data: Files of the corpus, or folders of such files.
        out: Folder of the store; made if missing. A store that is there is gone on with.
        append: Add the samples of --data to a finished store; its units are kept as they are.
        max_disk: Stop before the store grows beyond this, such as 500MB or 20GB; the same
            command with more room goes on. Empty for no limit.
        dry_run: Write nothing: run a few thousand tokens and predict bytes and time, for each
            profile.
        corpus: How text becomes samples.
        store: What the store holds.
        forward: How the base is run.
    """
    max_disk_bytes = parse_bytes(max_disk) if max_disk else None
    from carryon.cache.extraction.pipeline import run_extraction
    from carryon.cache.extraction.plan import plan_extraction

    plan = plan_extraction(
        base=base, data=data, out=out, corpus=corpus, store=store, forward=forward
    )
    if dry_run:
        return _print_estimate(plan)
    report = run_extraction(plan, append=append, max_disk_bytes=max_disk_bytes)
    if not report.is_finished:
        logger.warning(f"stopped at --max-disk {max_disk}; give more to go on")
    logger.info(
        f"{report.store}: {report.num_tokens:,} tokens in {report.num_units:,} units; computed "
        f"{report.computed_tokens:,} of them now in {report.elapsed_s:,.0f} s, "
        f"{report.stored_bytes / 1e6:,.1f} MB of {report.raw_bytes / 1e6:,.1f} MB raw"
    )
    print(json.dumps(report.to_dict()))
    return report.to_dict()


def _print_estimate(plan: "ExtractionPlan") -> dict[str, Any]:
    from carryon.cache.extraction.estimate import estimate

    found = estimate(plan)
    logger.info(
        f"{found.num_samples:,} samples, {found.num_tokens:,} tokens, {found.num_units:,} units; "
        f"{found.tokens_per_second:,.0f} tokens/s here: about {found.elapsed_s / 60:,.1f} minutes\n"
        f"hidden states raw: {found.raw_bytes / 1e6:,.1f} MB"
    )
    for name, profile in found.profiles.items():
        errors = profile.errors.get("final") or profile.errors.get("prenorm") or {}
        quality = f", KL {errors['kl']:.1e}, top-1 {errors['top1']:.3f}" if errors else ""
        logger.info(
            f"  {name:<8} store of {profile.store_bytes / 1e6:,.1f} MB, states "
            f"{profile.ratio:.3f} of raw{quality}"
        )
    print(json.dumps(found.to_dict()))
    return found.to_dict()


def parse_bytes(text: str) -> int:
    """Return the bytes of `500MB`, `20 GB`, `1.5T` or a plain number; powers of 1,000.

    Raises:
        InputError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise InputError(f"--max-disk: expected a size such as 500MB or 20GB, got {text!r}")
    return int(float(found[1]) * UNIT_BYTES[found[2].upper()])
