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
from carryon.tools.cli.output import print_result, visible
from carryon.tools.cli.places import check_folder
from carryon.tools.cli.table import format_table, side_by_side
from carryon.tools.demo.corpus import SCORED_SEED, TASK

logger = logging.getLogger(__name__)

TAPS = ["final", "layer.20", "layer.10"]
"""`final` alone says what comes next; the layers below also say what stands here, which a worked
answer copies. On this task each layer added is worth more in right answers than in loss."""
ANSWER_TOKENS = 136
"""Longest answer; worked answers to the training problems have up to 133 tokens."""


def demo(*, out: str = "carryon-demo", samples: int = 520, num: int = 120) -> dict[str, Any]:
    """Customize a real LLM in a few minutes on two CPU cores.

    The base is SmolLM2-135M-Instruct, from the hub or from a 93 MB package where there is no hub.
    The corpus is problems (how many legs have some animals) with answers worked out in plain
    words. Hidden states are extracted once. A carry-on of 1.4 MB is trained from them without the
    base. Then base and customized model answer problems that neither has seen, and one of them is
    shown. Each command is logged, so that you can repeat it. After an interruption the same
    command resumes.

    Example:
        carryon demo --out my-demo

    Args:
        out: Folder for corpus, base, store and run.
        samples: Training problems. More take longer and teach more.
        num: Unseen problems that both answer in the end.
    """
    from carryon.tools.demo.base_model import fetch_base
    from carryon.tools.demo.corpus import count_held_out, prepare_corpus

    for name, value in (("--samples", samples), ("--num", num)):
        if value < 8:
            raise InputError(f"{name}: expected 8 or more problems, got {value}")
    check_folder(out, name="--out")
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
    for argv in commands(root, num=num):
        results[argv[0]] = _run(argv, seconds)
    question, texts = answers_won(root / "answers.jsonl")
    shown = side_by_side(("base", texts["base"]), ("base + carry-on", texts["carryon"]))
    logger.info(f"\n{visible(question)}\n{visible(shown)}\n")
    again = shlex.join(["carryon", *answer_command(root, question)])
    logger.info(f"{summary(root, results, seconds)}\n\nAsk it yourself:\n$ {again}")
    results["answered"] = {"question": question, **texts}
    return print_result({"seconds": seconds, **results})


def _run(argv: list[str], seconds: dict[str, float]) -> Any:  # noqa: ANN401 -- each has its own
    """Run a command, logged as typed; its seconds are noted."""
    logger.info(f"\n$ {shlex.join(['carryon', *argv])}")
    started_at = time.perf_counter()
    output = io.StringIO()
    with redirect_stdout(output):
        result = call_command(argv[0], argv[1:])
    if argv[0] == "inspect":  # the others print a JSON line
        logger.info(output.getvalue().rstrip())
    seconds[argv[0]] = time.perf_counter() - started_at
    return result


def commands(root: Path, *, num: int) -> list[list[str]]:
    """Return the commands of the demo up to the scores, as words after `carryon`."""
    corpus, base, store, run, answers, page = (
        str(root / name)
        for name in ("corpus.jsonl", "base", "store", "run", "answers.jsonl", "answers.html")
    )
    carryon = f"{run}/carryon"
    shape = ["--taps", *TAPS, "--epochs", "8", "--learning-rate", "0.002"]
    shape += ["--sampled-softmax", "2048"]
    unseen = ["--tasks", TASK, "--task-seed", str(SCORED_SEED), "--num", str(num)]
    return [
        ["extract", "--base", base, "--data", corpus, "--out", store, "--taps", *TAPS],
        ["inspect", store],
        ["train", "--store", store, "--out", run, *shape],
        ["score", "--carryon", carryon, "--base", base, *unseen, "--store", store, "--drop-known"]
        + ["--max-new-tokens", str(ANSWER_TOKENS), "--batch-rows", "120"]
        + ["--out", answers, "--html", page],
    ]


def answer_command(root: Path, question: str) -> list[str]:
    """Return the command that answers a question once more with base and carry-on."""
    return [
        *("generate", "--carryon", str(root / "run/carryon"), "--base", str(root / "base")),
        *("--compare", "--max-new-tokens", str(ANSWER_TOKENS), "--prompt", question),
    ]


def answers_won(answers: Path) -> tuple[str, dict[str, str]]:
    """Return a question with its answers by arm: the shortest that only the carry-on got right.

    If there is none, the shortest of all. One that only one of them has answered, in a run that was
    stopped, is passed over.
    """
    with answers.open(encoding="utf-8") as lines:
        given = [json.loads(line) for line in lines][1:]  # behind the settings
    by_question: dict[str, dict[str, dict[str, Any]]] = {}
    for each in given:
        by_question.setdefault(each["question"], {})[each["arm"]] = each
    both = {text: arms for text, arms in by_question.items() if {"base", "carryon"} <= arms.keys()}
    won = [
        text
        for text, arms in both.items()
        if arms["carryon"]["is_right"] and not arms["base"]["is_right"]
    ]
    question = min(won or both, key=len)
    return question, {arm: str(each["text"]) for arm, each in both[question].items()}


def summary(root: Path, results: dict[str, Any], seconds: dict[str, float]) -> str:
    """Return the closing table."""
    facts, trained = results["inspect"], results["train"]
    [scored] = results["score"]
    stored = sum(facts["array_bytes"][f"hidden/{tap}"] for tap in facts["taps"])
    rows = [
        *(
            (
                f"right of {scored['num']} unseen problems, {each['arm']}",
                f"{each['right']:.0f} ({each['low']:.0%} to {each['high']:.0%})",
            )
            for each in scored["arms"]
        ),
        ("held-out NLL, base", f"{trained['base_nll']:.3f} nats per answer token"),
        ("held-out NLL, with carry-on", f"{trained['carryon_nll']:.3f}"),
        ("carry-on", f"{trained['carryon_bytes'] / 1e6:.2f} MB"),
        ("hidden states in the store", f"{stored / 1e6:.1f} MB"),
        *((f"seconds, {name}", f"{value:.0f}") for name, value in seconds.items()),
        ("curves", str(root / "run" / "curves.png")),
        ("all answers", str(root / "answers.html")),
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
