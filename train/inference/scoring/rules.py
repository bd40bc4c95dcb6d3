"""Rules: what of an answer counts, and whether it is right.

    rule             an answer is right if
    last-number      its last number is the right one
    boxed            what its last \\boxed{} holds is
    after:MARKER     what follows the last MARKER on its line, or on the next one, is
    regex:PATTERN    the first group of the last match, if not empty, is
    exact            it is the right one and nothing else, apart from space around it
    end              it ends with the right one; for a number, its last number is
    task             the task's own verifier gives full credit to it, to the answer that it marks as
                     final, or to its last line; a right number counts without the exact wording
    module:function  the function, called with the text and the problem, returns true or 1

Numbers are compared as numbers: 1,000, 1000.0 and $1000 are the same.
"""

import importlib
import logging
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carryon.cache.errors import InputError
from carryon.cache.time_limit import TimeLimitError, limited_time
from carryon.train.inference.scoring.numbers import (
    ends_with,
    find_numbers,
    find_stated,
    get_quantity,
    is_as_reduced,
    is_other_unit,
    is_same,
    parse_number,
    unit_behind_last,
)
from carryon.train.inference.scoring.plain_text import to_plain

if TYPE_CHECKING:
    from carryon.train.inference.scoring.problems import Problem

NAMES = "last-number, boxed, after:MARKER, regex:PATTERN, exact, end, task or module:function"
FULL_CREDIT = 1.0
MAX_SECONDS = 10.0
"""Of processor time for a pattern or a verifier on an answer; it takes milliseconds."""
MAX_FUNCTION_SECONDS = 60.0
"""Of processor time for a function of the user, which may import packages or run tests."""
logger = logging.getLogger(__name__)
_BETWEEN = re.compile("importlib|contextlib|time_limit")
"""In the paths of files that are not the user's."""
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_MARKER = re.compile(
    r"(?:\banswer[*_]*\s*(?:is\b|[:=])|\bfinal answer(?:\s+is)?\b|####\s*(?=[-$\d]))[\s:=*_]*",
    re.IGNORECASE,
)
_TAG_END = re.compile("</answer>", re.IGNORECASE)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Decides from an answer's text and a problem whether the answer is right."""

    name: str
    """As typed."""
    find: Callable[[str], str | None]
    """Returns what of an answer counts; None where there is none of it."""
    judge: "Callable[[str, Problem], bool]"
    """Returns whether what counts is right."""
    lacks: "Callable[[Problem], str]" = lambda _: ""
    """Returns what the rule needs and the problem does not have; empty if it has all."""
    module: str | None = None
    """Of a function of the user."""

    def is_right(self, text: str, problem: "Problem") -> bool:
        """Return whether an answer to a problem is right.

        Raises:
            InputError: the rule is a function of the user that failed; the text has its place.
        """
        found = self.find(text)
        return found is not None and self.judge(found, problem)


def parse_rule(text: str) -> Rule:
    """Return the rule that a text names.

    Raises:
        InputError: there is no such rule, or its pattern or function is wrong.
    """
    kind, colon, rest = text.partition(":")
    if text in _PLAIN:
        return _PLAIN[text]
    if kind == "after" and rest.strip():
        return _extracting(text, lambda answer: find_after(answer, rest))
    if kind == "regex" and rest:
        return _extracting(text, _pattern(text, rest))
    if colon and kind not in ("after", "regex") and _FUNCTION.fullmatch(text):
        return _calling(text)
    raise InputError(f"rule: expected {NAMES}, got {text!r}. Fix: --rule last-number")


def find_last_number(text: str) -> str | None:
    """Return the last number of a text, as written."""
    return next(reversed(find_numbers(text)), None)


def find_boxed(text: str) -> str | None:
    """Return what the last whole \\boxed{} holds."""
    starts = {match.end() for match in re.finditer(r"\\boxed\s*\{", text)}
    if not starts:
        return None
    last, end, opened = -1, -1, list[int]()
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts and start > last:
            last, end = start, brace.start()
    return text[last:end].strip() if last >= 0 else None


def find_after(text: str, marker: str) -> str | None:
    """Return what follows the last marker, ignoring case, up to the end of a line with text."""
    ends = [match.end() for match in re.finditer(re.escape(marker.strip()), text, re.IGNORECASE)]
    rest = text[ends[-1] :].strip(" \t\r\n:*") if ends else ""
    return rest.splitlines()[0].strip() if rest else None


def find_marked(text: str, *, is_number: bool = False) -> str | None:
    """Return the answer that a text marks as final: tagged, boxed, or behind `answer is`, ...

    Args:
        text: an answer.
        is_number: behind `answer is`, ... only a part with a digit counts: this answer is helpful.
    """
    ends = [match.end() for match in _TAG_END.finditer(text)]
    if tagged := _TAGGED.findall(text[: ends[-1]] if ends else ""):
        return str(tagged[-1]).strip()
    if (boxed := find_boxed(text)) is not None:
        return boxed
    for marker in reversed(list(_MARKER.finditer(text))):
        end = text.find("\n", marker.end())
        marked = text[marker.end() : end if end >= 0 else None].strip(" \t.*_")
        marked = marked.removeprefix("- ") if "\n" in marker[0] else marked  # an item of a list
        if marked and (not is_number or re.search(r"\d", marked)):
            return marked
    return None


def _is_same(found: str, right: str) -> bool:
    """Return whether a found part is the right answer.

    Where that is a number, the part may be a sentence that states it, as of `find_stated`.
    """
    if is_same(found, right):
        return True
    quantity = get_quantity(right)
    if quantity is None or get_quantity(found) is not None:
        return False
    stated = find_stated(found)
    return stated is not None and parse_number(stated) == quantity[0]


def _extracting(name: str, find: Callable[[str], str | None]) -> Rule:
    """Return a rule that compares a part of the answer with that part of the right one."""

    def judge(found: str, problem: "Problem") -> bool:
        return _is_same(found, find(problem.answer) or problem.answer)

    return Rule(name=name, find=find, judge=judge, lacks=_lacks_answer)


def _pattern(name: str, pattern: str) -> Callable[[str], str | None]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"rule {name!r}: expected a regular expression: {error}") from error

    def find(text: str) -> str | None:
        group = 1 if compiled.groups else 0
        try:
            with limited_time(MAX_SECONDS):
                parts = [match[group] for match in compiled.finditer(text) if match[group]]
        except TimeLimitError as error:
            raise InputError(
                f"rule {name!r}: {error} on the answer {text!a:.60}. Fix: a simpler pattern"
            ) from error
        return parts[-1] if parts else None

    return find


def _judge_number(found: str, problem: "Problem") -> bool:
    return is_same(found, find_last_number(problem.answer) or problem.answer)


def _judge_end(found: str, problem: "Problem") -> bool:
    quantity = get_quantity(problem.answer)
    if quantity is None:
        return ends_with(found, problem.answer)
    last, (value, unit) = find_last_number(found), quantity
    if last is None or parse_number(last) != value:
        return False
    return not is_other_unit(unit, unit_behind_last(found))  # 7 am is not 7 pm


def _judge_task(found: str, problem: "Problem") -> bool:
    if any(_credit(problem, each) >= FULL_CREDIT for each in _finals(found)):
        return True
    quantity = get_quantity(problem.answer)
    if quantity is None:
        return False
    marked = find_marked(found, is_number=True)
    # the question's own fraction or formula is no answer
    if marked is None:
        stated = find_stated(found, begins=False)
        is_right = stated is not None and parse_number(stated) == quantity[0]
    else:
        stated = marked if get_quantity(marked) else find_stated(marked)
        is_right = _is_same(marked, problem.answer)
    return is_right and is_as_reduced(stated or "", problem.answer)


def _finals(found: str) -> list[str]:
    """Return what a verifier may take for the answer: all, and what is marked or comes last."""
    marked = find_marked(found)
    final = found.splitlines()[-1].strip() if marked is None else marked
    ends = [match.end() for match in _MARKER.finditer(found)]
    tail = found[ends[-1] :].strip(" \t\r\n`") if ends else ""
    line = tail.partition("\n")[0].strip()
    return [each for each in dict.fromkeys([found, final, to_plain(final), tail, line]) if each]


def _credit(problem: "Problem", text: str) -> float:
    assert problem.verify is not None
    try:
        with limited_time(MAX_SECONDS):
            return float(problem.verify(text))
    except TimeLimitError as error:
        logger.warning(f"{problem.id}: verifier: {error} on the answer {text!a:.60}: wrong")
        return 0.0
    except Exception:  # noqa: BLE001 -- a verifier that cannot read an answer does not accept it
        return 0.0


def _lacks_number(problem: "Problem") -> str:
    return "" if find_numbers(problem.answer) else "an answer with a number"


def _lacks_answer(problem: "Problem") -> str:
    return "" if problem.answer.strip() else "an answer"


def _lacks_verifier(problem: "Problem") -> str:
    return "" if problem.verify else "a task of reasoning-gym, which has a verifier"


def _some(text: str) -> str | None:
    return text.strip() or None


_PLAIN = {
    rule.name: rule
    for rule in (
        Rule(name="last-number", find=find_last_number, judge=_judge_number, lacks=_lacks_number),
        _extracting("boxed", find_boxed),
        Rule(
            name="exact",
            find=_some,
            judge=lambda found, problem: found == problem.answer.strip(),
            lacks=_lacks_answer,
        ),
        Rule(name="end", find=_some, judge=_judge_end, lacks=_lacks_answer),
        Rule(name="task", find=_some, judge=_judge_task, lacks=_lacks_verifier),
    )
}


def _calling(name: str) -> Rule:
    """Return a rule of the user: a function in a module, of the working directory too."""
    module_name, _, path = name.partition(":")
    folder, before = str(Path.cwd()), list(sys.path)
    sys.path.insert(0, folder)
    try:
        function: Any = importlib.import_module(module_name)
        for part in path.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"rule {name!r}: expected a function in a module that can be imported here: "
            f"{_told(error)}"
        ) from error
    finally:
        sys.path[:] = before
    if not callable(function):
        raise InputError(f"rule {name!r}: expected a function, got {type(function).__name__}")

    def judge(text: str, problem: "Problem") -> bool:
        try:
            with limited_time(MAX_FUNCTION_SECONDS):
                verdict = function(text, problem)
        except (Exception, SystemExit) as error:
            raise InputError(f"rule {name!r}: {_told(error)}") from error
        if isinstance(verdict, np.generic):
            verdict = verdict.item()
        if not isinstance(verdict, bool | int | float):
            got = type(verdict).__name__
            raise InputError(f"rule {name!r}: expected true or false, or 0 to 1, got {got}")
        return verdict >= FULL_CREDIT

    return Rule(name=name, find=_some, judge=judge, module=module_name)


def _told(error: Exception | SystemExit) -> str:
    """Return an error of the user's code with its place, on one line."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if not _BETWEEN.search(frame.filename)]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
