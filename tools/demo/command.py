"""`carryon demo`: the whole way on real input, one command per step.

Each step but the first two is a `carryon` command, printed as a user would type it and run as
printed. Everything stays in one folder: corpus.jsonl, base/, store/, run/. A second run goes on
where the first one stopped.
"""

import io
import json
import logging
import shlex
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError

logger = logging.getLogger(__name__)

OWN_NAMES = {"corpus.jsonl", "base", "store", "run"}
ANSWER_TOKENS = 160
"""Longest answer shown at the end."""


def demo(*, out: str = "carryon-demo", samples: int = 200) -> dict[str, Any]:
    """Customize a real LLM on real text, from nothing, in a few minutes on two CPU cores.

    The base is SmolLM2-135M-Instruct (from the hub, or a 93 MB package where there is no hub),
    the text GSM-symbolic problems with worked answers. Their hidden states are extracted once; a
    1 MB carry-on of two blocks is trained from them, without the base, and measured on problems
    it has never seen; then both answer one of them. Each command is printed, so that you can go
    on from there. Stop it at any time: the same command goes on.

    Example:
        carryon demo --out my-demo --samples 1000

    Args:
        out: Folder for everything: corpus, base, store and run.
        samples: Training problems. More take longer and teach more; 1000 is the full run.
    """
    if samples < 8:
        raise InputError(f"samples: expected 8 or more problems, got {samples}")
    root = Path(out)
    refuse_foreign_folder(root)
    seconds: dict[str, float] = {}
    for name, step in (("corpus", _make_corpus), ("base", _fetch_base)):
        started_at = time.perf_counter()
        step(root, samples)
        seconds[name] = time.perf_counter() - started_at
    results: dict[str, dict[str, Any]] = {}
    for argv in commands(root):
        logger.info(f"\n$ {shlex.join(['carryon', *argv])}")
        started_at = time.perf_counter()
        results[argv[0]] = _run(argv)
        seconds[argv[0]] = time.perf_counter() - started_at
    logger.info(summary(root, results, seconds))
    report = {"seconds": seconds, **results}
    print(json.dumps(report))
    return report


def commands(root: Path) -> list[list[str]]:
    """Return the commands of the demo, as words after `carryon`."""
    corpus, base, store, run = (
        str(root / name) for name in ("corpus.jsonl", "base", "store", "run")
    )
    carryon = f"{run}/carryon"
    question = held_out_question(root / "corpus.jsonl")
    return [
        ["extract", "--base", base, "--data", corpus, "--out", store],
        ["inspect", store],
        ["train", "--store", store, "--out", run, "--epochs", "3"],
        ["evaluate", "--store", store, "--carryon", carryon],
        ["generate", "--carryon", carryon, "--base", base, "--compare"]
        + ["--max-new-tokens", str(ANSWER_TOKENS), "--prompt", question],
    ]


def held_out_question(corpus: Path) -> str:
    """Return the first held-out question of the corpus that a shell takes in plain quotes."""
    with corpus.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    questions = [
        str(record["messages"][0]["content"]) for record in records if record["split"] == "held-out"
    ]
    return next((question for question in questions if "'" not in question), questions[0])


def summary(root: Path, results: dict[str, dict[str, Any]], seconds: dict[str, float]) -> str:
    """Return the closing table."""
    facts, trained, measured = (results[name] for name in ("inspect", "train", "evaluate"))
    [tap] = facts["taps"]
    stored = facts["array_bytes"][f"hidden/{tap}"]
    rows = [
        ("held-out NLL, base", f"{measured['base_nll']:.3f} nats per answer token"),
        ("held-out NLL, with carry-on", f"{measured['carryon_nll']:.3f}"),
        ("carry-on", f"{trained['carryon_bytes'] / 1e6:.2f} MB"),
        (
            "hidden states in the store",
            f"{stored / 1e6:.1f} MB, {facts['ratio_to_raw'][tap]:.3f} of raw bfloat16",
        ),
        *((f"seconds, {name}", f"{value:.0f}") for name, value in seconds.items()),
        ("curves", str(root / "run" / "curves.png")),
    ]
    return "\n".join(["", *(f"{name:<28} {value}" for name, value in rows)])


def refuse_foreign_folder(root: Path) -> None:
    """Check that `root` is new, empty, or of an earlier demo.

    Raises:
        InputError: it holds something else.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"{root}: expected a folder for the demo, got a file")
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if names and "corpus.jsonl" not in names:
        raise InputError(
            f"{root}: expected a new or empty folder, or one of an earlier demo, but it holds "
            f"{min(names)}: give another --out"
        )


def _make_corpus(root: Path, samples: int) -> None:
    from carryon.tools.demo.corpus import check_corpus, count_held_out, write_corpus

    path = root / "corpus.jsonl"
    if not path.exists():
        write_corpus(path, samples)
    check_corpus(path, samples)
    held_out = count_held_out(samples)
    logger.info(f"{path}: {samples} GSM-symbolic problems, and {held_out} others held out")


def _fetch_base(root: Path, samples: int) -> None:
    from carryon.tools.demo.base_model import fetch_base

    folder = root / "base"
    origin = "already there" if folder.exists() else f"from {fetch_base(folder)}"
    logger.info(f"{folder}: SmolLM2-135M-Instruct, {origin}")


def _run(argv: list[str]) -> dict[str, Any]:
    from carryon.tools.cli.subcommands import call_subcommand

    output = io.StringIO()
    with redirect_stdout(output):
        result: dict[str, Any] = call_subcommand(argv[0], argv[1:])
    if argv[0] in ("inspect", "generate"):  # the others print a JSON line
        logger.info(output.getvalue().rstrip())
    return result
