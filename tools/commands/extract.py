"""`carryon extract`: corpus and base in, store out."""

import logging
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from carryon.cache.errors import InputError
from carryon.cache.exchange.engine.settings import VllmSettings
from carryon.cache.progress import show_seconds
from carryon.cache.settings import (
    CorpusSettings,
    DataSettings,
    ForwardSettings,
    RaySettings,
    StoreSettings,
)
from carryon.tools.cli.output import print_result
from carryon.tools.cli.sizes import parse_bytes
from carryon.tools.cli.table import format_table

if TYPE_CHECKING:
    from carryon.cache.extraction.estimate import Estimate
    from carryon.cache.extraction.report import ExtractReport

logger = logging.getLogger(__name__)


def extract(
    *,
    base: str,
    data: list[str],
    out: str,
    append: bool = False,
    max_disk: str = "",
    dry_run: bool = False,
    align_to: str = "",
    drop_missing: bool = False,
    workers: int = 0,
    backend: Literal["transformers", "vllm", "ray"] = "transformers",
    endpoint: str = "",
    ray: RaySettings,
    corpus: CorpusSettings,
    store: StoreSettings,
    forward: ForwardSettings,
    data_settings: DataSettings,
    vllm: VllmSettings,
) -> dict[str, Any]:
    """Run a frozen base over a corpus once and keep its hidden states.

    Training, evaluation and merging then need the store, not the corpus. The store is written
    unit by unit; after an interruption the same command resumes. First, before the base is
    loaded, a table lists records read, kept and lost, by reason; the first batches predict bytes
    and time.
    The last line on stdout is a JSON line with the figures.

    Data are files, also compressed: JSON lines or arrays, CSV, Parquet, Arrow or plain text;
    folders of them; or ids on the Hugging Face hub, NAME/REPO:SPLIT or NAME/REPO@REVISION.
    Records are chats (`messages` or `conversations`), `prompt` and `completion`, preference
    pairs (`chosen` and `rejected`; stored, not trained on), or `text`. A record may have an `id`
    and a `split`, which is `train` or `held-out`.

    Example:
        carryon extract --base HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --out store

    Args:
        base: The base: hub id (NAME/REPO or NAME/REPO@REVISION), folder or .gguf file.
        data: Files of the corpus, folders of such files, or hub ids.
        out: Folder of the store, created if missing. An existing store is resumed.
        append: Add the samples of --data to a finished store; its units stay as they are.
        max_disk: Stop before the store exceeds this size, such as 500MB or 20GB; with a higher
            limit the same command resumes. Empty: no limit.
        dry_run: Write nothing: run a few batches and estimate the size of each profile, and the
            time.
        align_to: A finished store of another base, made of the same --data: the new store has its
            samples and rows, with this base's states. Empty: a store of its own.
        drop_missing: With --align-to: leave out, and count, samples that only one of both has.
        workers: Processes on this machine that claim units, each with a base and a share of the
            cores; `auto` deals out accelerators. The same command with --workers on other nodes of
            a shared file system joins in. 0: this process alone, no other may write.
        backend: What runs the base: `transformers` here; `vllm` in vLLM's own environment, see
            --vllm-python; `ray`: transformers in --workers actors of a Ray cluster, each on a GPU
            or on CPUs of some node. 0 of them: as many as there is room for.
        endpoint: Address of a vLLM server that runs the base and writes states to
            --states-folder, such as http://127.0.0.1:8000. Empty: the base is run here.
        ray: How actors of Ray take part.
        corpus: How text becomes samples.
        store: What the store holds.
        forward: How the base is run.
        data_settings: How the data are read.
        vllm: How vLLM is run or asked.
    """
    from carryon.cache.extraction.sharing.workers import check_backend, plan_sharing

    max_disk_bytes = parse_bytes("--max-disk", max_disk) if max_disk else None
    is_ray = check_backend(backend, ray, others=["vllm"])
    if is_ray and endpoint:
        raise InputError(
            f"--endpoint: expected none with --backend ray, got {endpoint}. Fix: leave one out"
        )
    sharing, forward = plan_sharing(workers, forward, ray=ray if is_ray else None)
    inputs: dict[str, Any] = {
        "base": base,
        "data": data,
        "out": out,
        "corpus": corpus,
        "store": store,
        "forward": forward,
        "data_settings": data_settings,
        "is_shared": sharing is not None,
    }
    if backend == "vllm" or endpoint:
        _refuse_with_vllm(align_to=bool(align_to), drop_missing=drop_missing, dry_run=dry_run)
        from carryon.cache.exchange.engine.extraction import run_with_vllm
        from carryon.cache.exchange.engine.planning import plan_with_vllm

        asked = plan_with_vllm(**inputs, vllm=vllm, endpoint=endpoint)
        done = run_with_vllm(asked, append=append, max_disk_bytes=max_disk_bytes, sharing=sharing)
        return _show(done, max_disk)
    _refuse_without_vllm(vllm)
    if align_to:
        from carryon.cache.extraction.aligned import (
            plan_aligned,
            refuse_with_alignment,
            run_aligned,
        )

        refuse_with_alignment(append=append, dry_run=dry_run)
        aligned = plan_aligned(**inputs, align_to=align_to, drop_missing=drop_missing)
        return _show(run_aligned(aligned, max_disk_bytes=max_disk_bytes, sharing=sharing), max_disk)
    if drop_missing:
        raise InputError("--drop-missing: expected --align-to beside it. Fix: --align-to STORE")
    from carryon.cache.extraction.pipeline import run_extraction
    from carryon.cache.extraction.plan import plan_extraction

    plan = plan_extraction(**inputs)
    if dry_run:
        from carryon.cache.extraction.estimate import estimate

        expected = estimate(plan)
        facts = asdict(expected) | {"report": plan.manifest.parts[-1].report}
        return print_result(facts, _describe(expected))
    report = run_extraction(plan, append=append, max_disk_bytes=max_disk_bytes, sharing=sharing)
    return _show(report, max_disk)


def _refuse_with_vllm(**options: bool) -> None:
    """Refuse options that need the base's forward passes here."""
    for name in [name for name, is_given in options.items() if is_given]:
        raise InputError(
            f"--{name.replace('_', '-')}: expected it with --backend transformers only, got vLLM. "
            "Fix: leave it out"
        )


def _refuse_without_vllm(vllm: VllmSettings) -> None:
    """Refuse options of vLLM where it is not asked for."""
    for item in fields(VllmSettings):
        if getattr(vllm, item.name) != getattr(VllmSettings(), item.name):
            raise InputError(
                f"--{item.name.replace('_', '-')}: expected it with --backend vllm or --endpoint "
                "only, got --backend transformers. Fix: add one, or leave it out"
            )


def _show(report: "ExtractReport", max_disk: str) -> dict[str, Any]:
    """Print the summary of an extraction."""
    if not report.is_finished:
        logger.warning(f"stopped at --max-disk {max_disk}. Fix: raise it to resume")
    return print_result(
        asdict(report),
        f"{report.store}: {report.num_tokens:,} tokens in {report.num_units:,} units, "
        f"{report.computed_tokens:,} computed now\nwritten: {report.written}",
    )


def _describe(expected: "Estimate") -> str:
    rows = [("profile", "store MB", "states MB", "states / raw", "KL", "top-1")]
    for name, profile in expected.profiles.items():
        errors = profile.errors.get("final") or profile.errors.get("prenorm") or {}
        quality = (f"{errors['kl']:.1e}", f"{errors['top1']:.3f}") if errors else ("", "")
        store, states = f"{profile.store_bytes / 1e6:,.1f}", f"{profile.stored_bytes / 1e6:,.1f}"
        rows.append((name, store, states, f"{profile.ratio:.3f}", *quality))
    return (
        f"{expected.num_samples:,} samples, {expected.num_tokens:,} tokens, "
        f"{expected.num_units:,} units; {expected.tokens_per_second:,.0f} tokens/s here: about "
        f"{show_seconds(expected.elapsed_s)}\npredicted: states {expected.raw_bytes / 1e6:,.1f} MB "
        f"raw, head {expected.head_bytes / 1e6:,.1f} MB, blocks "
        f"{expected.blocks_bytes / 1e6:,.1f} MB\n{format_table(rows)}"
    )
