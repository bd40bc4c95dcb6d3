"""The `carryon` program: its commands, and which options their short help shows."""

import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

_IS_STARTING = threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _IS_STARTING:  # Ctrl-C ends the process until `Program.main` sees to it: an import may lose it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    from carryon.tools.cli.program import Program
finally:
    if _IS_STARTING:
        signal.signal(signal.SIGINT, signal.default_int_handler)

CARRYON = Program(
    prog="carryon",
    about=(
        "Customize an LLM without training it: extract its hidden states from your text once,\n"
        "train small carry-on modules from that store, and run them on top of the frozen base."
    ),
    closing="carryon COMMAND --help explains its options. New here? Run carryon demo.",
    commands={
        "demo": "carryon.tools.demo.command:demo",
        "preview": "carryon.tools.commands.preview:preview",
        "convert": "carryon.tools.commands.checkpoints.convert:convert",
        "extract": "carryon.tools.commands.extract:extract",
        "import": "carryon.tools.commands.exchange.import_states:import_states",
        "export": "carryon.tools.commands.exchange.export_states:export_states",
        "recode": "carryon.tools.commands.exchange.recode:recode",
        "inspect": "carryon.tools.commands.inspect_store:inspect_store",
        "verify": "carryon.tools.commands.verify:verify",
        "repair": "carryon.tools.commands.repair:repair",
        "train": "carryon.tools.commands.train:train",
        "sweep": "carryon.tools.commands.sweep:sweep",
        "update": "carryon.tools.commands.update:update",
        "versions": "carryon.tools.commands.versions:versions",
        "evaluate": "carryon.tools.commands.evaluate:evaluate",
        "gates": "carryon.tools.commands.gates:gates",
        "generate": "carryon.tools.commands.generate:generate",
        "merge": "carryon.tools.commands.checkpoints.merge:merge",
        "score": "carryon.tools.commands.score:score",
        "sample": "carryon.tools.improve.sample:sample",
        "improve": "carryon.tools.improve.command:improve",
        "compare": "carryon.tools.compare.command:compare",
        "plan-memory": "carryon.tools.commands.plan_memory:plan_memory",
    },
    basic={
        "preview": "base data rows html chat_template",
        "extract": "base data out taps append dry_run",
        "import": "source folder base layer_ids out taps data append",
        "repair": "store base",
        "train": "store out learning_rate epochs kind taps config",
        "sweep": "store out vary runs epochs",
        "update": "lineage data base alpha config",
        "evaluate": "store carryon samples alpha plot",
        "generate": "carryon prompt base alpha compare max_new_tokens",
        "score": "tasks carryon base arms rule num out html",
        "sample": "base carryon tasks data rule num samples keep instruction temperature out",
        "improve": "base tasks data rule rounds num samples instruction taps out",
        "compare": "base data out methods seconds seeds",
        "plan-memory": "base_width vocab_size tokens_per_step limit config",
    },
)


def call_command(name: str, argv: Sequence[str]) -> Any:  # noqa: ANN401 -- each has its own
    """Run `carryon NAME ARGV...` in this process and return its result."""
    return CARRYON.call(name, argv)


def check_command(name: str, argv: Sequence[str]) -> None:
    """Check the options of `carryon NAME ARGV...` without running it."""
    CARRYON.check(name, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `carryon` with `argv` (default: the command line) and return its exit code."""
    return CARRYON.main(argv)


if __name__ == "__main__":
    sys.exit(main())
