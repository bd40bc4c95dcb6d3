"""The subcommands of `carryon`, by name, and how one is called."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from carryon.cache.errors import InputError
from carryon.tools.command_line import parse_call

SUBCOMMANDS = {
    "demo": "demo",
    "extract": "extract",
    "inspect": "inspect_store",
    "verify": "verify",
    "repair": "repair",
    "train": "train",
    "sweep": "sweep",
    "update": "update",
    "versions": "versions",
    "evaluate": "evaluate",
    "generate": "generate",
    "merge": "merge",
    "score": "score",
    "compare": "compare",
    "plan-memory": "plan_memory",
    "experiment cot": "experiment_cot",
    "bench store": "bench_store",
    "bench train": "bench_train",
    "bench compose": "bench_compose",
    "bench merge": "bench_merge",
    "bench paths": "bench_paths",
    "experiment paths": "experiment_paths",
}
"""Subcommand, of one word or two -> the file of this folder with a function of that file's
name."""


def join_name(words: Sequence[str]) -> list[str]:
    """Return `words` with a name of two words, such as `bench store`, as one of them."""
    name = " ".join(words[:2])
    return [name, *words[2:]] if name in SUBCOMMANDS else list(words)


def find_subcommand(name: str) -> Callable[..., Any]:
    """Return the function of the subcommand `name`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "see carryon --help"
        raise InputError(f"subcommand {name!r}: expected {', '.join(SUBCOMMANDS)}; {hint}")
    module = importlib.import_module(f"carryon.tools.{SUBCOMMANDS[name]}")
    function: Callable[..., Any] = getattr(module, SUBCOMMANDS[name])
    return function


def call_subcommand(name: str, argv: Sequence[str]) -> Any:  # noqa: ANN401 -- each has its own
    """Run `carryon NAME ARGV...` in this process and return what its function returns."""
    function = find_subcommand(name)
    call = parse_call(function, argv, prog=f"carryon {name}")
    return function(*call.args, **call.kwargs)
