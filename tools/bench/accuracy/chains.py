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


def write_chain(problem: Problem, *, wording: str) -> str:
    """Return the worked answer to a problem.

    Args:
        problem: of reasoning-gym, whose metadata say how it was made.
        wording: name of its writer: that of the generator, or another one.

    Raises:
        InputError: there is no such writer.
    """
    if wording not in WRITERS:
        raise InputError(f"--wording: expected one of {', '.join(WRITERS)}, got {wording!r}")
    return WRITERS[wording](problem)


def count_legs(problem: Problem) -> str:
    """Return the legs of each kind of animal, a line each, then their sums.

    What an animal has is said right behind its name, before it is multiplied: there a carry-on
    learns it from a few examples. The sums come last: between two animals they made small bases
    lose their place in the question.
    """
    lines, sums, total = list[str](), list[str](), 0
    for place, (animal, number) in enumerate(problem.metadata["animals"].items()):
        each, who = _legs()[animal], "1 {} has" if number == 1 else f"{number} {{}}s have"
        lines.append(f"{who.format(animal)} {each} legs: {number} * {each} = {number * each}")
        total += number * each
        sums += [f"{total - number * each} + {number * each} = {total}"] if place else []
    return _join([*lines, *sums], total)


def count_in_steps(problem: Problem) -> str:
    """Return the same as the demo has it for a small base: tens and ones are added apart."""
    return count_animals(problem.metadata["animals"], _legs())


def _legs() -> dict[str, int]:
    require("reasoning_gym", extra="demo", purpose="the corpus of leg_counting")
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    legs: dict[str, int] = ANIMALS
    return legs


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
    "leg_counting-steps": count_in_steps,
    "chain_sum": work_out,
    "basic_arithmetic": work_out,
    "gsm_symbolic": reword,
}
"""By name of the wording: that of the generator, or with more behind it."""


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
