"""Chains of thought in plain words: worked answers to problems of reasoning-gym. Pure.

The last line is a sentence: after a marker such as `####` small models write another number than
the one they have computed.
"""

import ast
from collections.abc import Callable, Sequence

from carryon.cache.errors import InputError
from carryon.cache.optional import require
from carryon.tools.demo.corpus import ENDING
from carryon.tools.demo.corpus import work_out as count_animals
from carryon.train.inference.scoring.problems import Problem

_MARKER = "\n#### "
_Operators = dict[type[ast.operator], tuple[str, Callable[[int, int], int]]]
_OPERATORS: _Operators = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
    ast.FloorDiv: ("/", lambda a, b: a // b),  # what the generator's `/` means
}


def write_chain(problem: Problem, *, task: str) -> str:
    """Return the worked answer to a problem.

    Args:
        problem: of reasoning-gym, whose metadata say how it was made.
        task: name of the generator.

    Raises:
        InputError: no chain can be written for the task.
    """
    if task not in WRITERS:
        raise InputError(f"task: expected one of {', '.join(WRITERS)}, got {task!r}")
    return WRITERS[task](problem)


def count_legs(problem: Problem) -> str:
    """Return the legs of each kind of animal with the sum so far, a line each, as in the demo."""
    require("reasoning_gym", extra="demo", purpose="the corpus of leg_counting")
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return count_animals(problem.metadata["animals"], ANIMALS)


def work_out(problem: Problem) -> str:
    """Return the operations of a formula, innermost and leftmost first, a line each."""
    lines = list[str]()
    tree = ast.parse(problem.metadata["expression"].replace("/", "//"), mode="eval")
    return _join(lines, _reduce(tree.body, lines))


def reword(problem: Problem) -> str:
    """Return the generator's own chain with its last line in plain words."""
    return in_plain_words(problem.metadata["answer_cot"])


def in_plain_words(chain: str) -> str:
    """Return a chain that ends with a number behind the marker, with a sentence for its end."""
    work, _, result = chain.rpartition(_MARKER)
    return _join([work], result)


WRITERS: dict[str, Callable[[Problem], str]] = {
    "leg_counting": count_legs,
    "chain_sum": work_out,
    "basic_arithmetic": work_out,
    "gsm_symbolic": reword,
}
"""By name of the generator."""


def _join(lines: Sequence[str], result: object) -> str:
    return "\n".join([*lines, ENDING.format(result)])


def _reduce(node: ast.expr, lines: list[str]) -> int:
    """Return the value of a formula; its operations are appended to `lines`."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_reduce(operand, lines)
        case ast.BinOp(left=left, op=operator, right=right):
            first, second = _reduce(left, lines), _reduce(right, lines)
            sign, function = _OPERATORS[type(operator)]
            value = function(first, second)
            shown = f"({second})" if second < 0 else second
            lines.append(f"{first} {sign} {shown} = {value}")
            return value
        case _:
            raise InputError(f"formula: expected whole numbers and + - * /, got {ast.dump(node)}")
