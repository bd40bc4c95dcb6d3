"""The subcommands of `carryon`, by name."""

from collections.abc import Sequence
from typing import Any

from carryon.tools.cli.program import Program

CARRYON = Program(
    prog="carryon",
    about=(
        "Customize an LLM without training it: extract its hidden states from your text once,\n"
        "train small carry-on modules from that store, and run them on top of the frozen base."
    ),
    closing="carryon SUBCOMMAND --help explains its options. New here? Run carryon demo.",
    commands={
        "demo": "carryon.tools.demo.command:demo",
        "extract": "carryon.tools.commands.extract:extract",
        "inspect": "carryon.tools.commands.inspect_store:inspect_store",
        "verify": "carryon.tools.commands.verify:verify",
        "repair": "carryon.tools.commands.repair:repair",
        "train": "carryon.tools.commands.train:train",
        "sweep": "carryon.tools.commands.sweep:sweep",
        "update": "carryon.tools.commands.update:update",
        "versions": "carryon.tools.commands.versions:versions",
        "evaluate": "carryon.tools.commands.evaluate:evaluate",
        "generate": "carryon.tools.commands.generate:generate",
        "merge": "carryon.tools.commands.merge:merge",
        "score": "carryon.tools.commands.score:score",
        "compare": "carryon.tools.compare.command:compare",
        "plan-memory": "carryon.tools.commands.plan_memory:plan_memory",
    },
)


def call_subcommand(name: str, argv: Sequence[str]) -> Any:  # noqa: ANN401 -- each has its own
    """Run `carryon NAME ARGV...` in this process and return what its function returns."""
    return CARRYON.call(name, argv)
