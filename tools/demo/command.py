"""`carryon demo`: every step of the flow on real input, in one folder.

After corpus and base, each step is a `carryon` command, logged as a user would type it and run in
this process. A second run resumes the first.
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
from carryon.tools.cli.main import call_command
from carryon.tools.cli.output import print_result
from carryon.tools.cli.table import format_table

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 160
"""Longest answer shown at the end."""


def demo(*, out: str = "carryon-demo", samples: int = 200) -> dict[str, Any]:
    """Customize a real LLM in a few minutes on two CPU cores.

    The base is SmolLM2-135M-Instruct, from the hub or from a 93 MB package where there is no hub.
    The corpus is GSM-symbolic problems with worked answers. Hidden states are extracted once. A
    1 MB carry-on of two blocks is trained from them without the base, measured on held-out
    problems, and answers one of them beside the base. Each command is logged, so that you can
    repeat it. After an interruption the same command resumes.

    Example:
        carryon demo --out my-demo --samples 1000

    Args:
        out: Folder for corpus, base, store and run.
        samples: Training problems. More take longer and teach more; 1000 is the full run.
    """
    from carryon.tools.demo.base_model import fetch_base
    from carryon.tools.demo.corpus import count_held_out, prepare_corpus

    if samples < 8:
        raise InputError(f"--samples: expected 8 or more problems, got {samples}")
    root = Path(out)
    refuse_foreign_folder(root)
    corpus, base = root / "corpus.jsonl", root / "base"
    seconds: dict[str, float] = {}
    started_at = time.perf_counter()
    prepare_corpus(corpus, samples)
    logger.info(f"{corpus}: {samples} problems to train on, {count_held_out(samples)} held out")
    seconds["corpus"] = time.perf_counter() - started_at
    started_at = time.perf_counter()
    origin = "already there" if base.exists() else f"from {fetch_base(base)}"
    logger.info(f"{base}: SmolLM2-135M-Instruct, {origin}")
    seconds["base"] = time.perf_counter() - started_at
    results: dict[str, Any] = {}
    for argv in commands(root):
        logger.info(f"\n$ {shlex.join(['carryon', *argv])}")
        started_at = time.perf_counter()
        output = io.StringIO()
        with redirect_stdout(output):
            results[argv[0]] = call_command(argv[0], argv[1:])
        if argv[0] in ("inspect", "generate"):  # the others print a JSON line
            logger.info(output.getvalue().rstrip())
        seconds[argv[0]] = time.perf_counter() - started_at
    return print_result({"seconds": seconds, **results}, f"\n{summary(root, results, seconds)}")


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
    """Return the first held-out question of the corpus that needs no escapes in a shell."""
    with corpus.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    questions = [
        str(record["messages"][0]["content"]) for record in records if record["split"] == "held-out"
    ]
    return next((question for question in questions if "'" not in question), questions[0])


def summary(root: Path, results: dict[str, Any], seconds: dict[str, float]) -> str:
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
    return format_table(rows)


def refuse_foreign_folder(root: Path) -> None:
    """Check that `root` is new, empty, or of an earlier demo.

    Raises:
        InputError: it holds something else.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"--out: expected a folder, got the file {root}")
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if names and "corpus.jsonl" not in names:
        raise InputError(
            f"--out: expected a new or empty folder or that of an earlier demo, got {root} with "
            f"{min(names)}. Fix: give another --out"
        )
