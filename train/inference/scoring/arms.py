"""Arms: a model and a way to ask it, such as the base with an instruction.

arm                       model                                       prompt
base                      the base                                    the question
carryon, carryon@ALPHA    base and carry-on, at its card's alpha or   the question
                          at ALPHA
carryon=FOLDER[@ALPHA]    the same with another carry-on
merged=FOLDER             another model of transformers, or hub id    the question
lora=FOLDER               the base with a LoRA of PEFT                the question
instruct:TEXT             the base                                    question, then TEXT
few-shot:K                the base                                    K problems with answers,
                                                                      then the question
MODEL+instruct:TEXT       MODEL; likewise MODEL+few-shot:K
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.train.inference.scoring.problems import Problem

FORMS = (
    "base, instruct:TEXT, few-shot:K, carryon, carryon@ALPHA, carryon=FOLDER@ALPHA, merged=FOLDER "
    "or lora=FOLDER"
)
MAX_SHOTS = 64
RESULT = "{answer}"
"""In a hint: the result of the problem."""
MAX_ALPHA = 10.0
_ASKING = re.compile(r"(?:^|\+)(instruct|few-shot):")
_MODEL = re.compile(r"(base|carryon|merged|lora)(?:=(.+?))?(?:@([^@=]*))?", re.DOTALL)
Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A model and a way to ask it."""

    name: str
    """As typed."""
    model: Literal["base", "carryon", "merged", "lora"]
    place: str = ""
    """Folder or hub id of the model; empty: the base or carry-on of all arms."""
    alpha: float | None = None
    """Strength of the carry-on; None: its card's."""
    instruction: str = ""
    """Text behind the question."""
    shots: int = 0
    """Solved problems before the question."""
    hint: str = ""
    """Text behind the question that tells the result in place of RESULT."""

    @property
    def is_plain(self) -> bool:
        """Whether the model is an ordinary checkpoint, which any engine runs."""
        return self.model in ("base", "merged")

    def make_prompt(self, problem: Problem, examples: Sequence[Problem]) -> list[Message]:
        """Return the messages that pose a problem; it is none of the examples shown."""
        num_system = next(
            (at for at, message in enumerate(problem.before) if message["role"] != "system"),
            len(problem.before),
        )
        shown: list[Message] = []
        others = [each for each in examples if each.folded != problem.folded]
        for example in others[: self.shots]:
            shown.append({"role": "user", "content": self._ask(example)})
            shown.append({"role": "assistant", "content": example.answer})
        question = {"role": "user", "content": self._ask(problem)}
        return [*problem.before[:num_system], *shown, *problem.before[num_system:], question]

    def _ask(self, problem: Problem) -> str:
        hint = self.hint.replace(RESULT, problem.result)
        behind = [text for text in (self.instruction, hint) if text]
        return "\n\n".join([problem.question.rstrip(), *behind]) if behind else problem.question


def parse_arms(texts: Sequence[str], *, has_carryon: bool) -> list[Arm]:
    """Return the arms that texts name; none given: the base, and the carry-on if there is one.

    Raises:
        InputError: a text names no arm, two are equal, or `carryon` without a carry-on.
    """
    arms = [_parse(text) for text in texts or ["base", *["carryon"] * has_carryon]]
    names = [arm.name for arm in arms]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"arms: expected each once, got {twice[0]!r} twice")
    for arm in arms:
        if arm.model == "carryon" and not arm.place and not has_carryon:
            raise InputError(
                f"arms: {arm.name}: expected a carry-on, got none. Fix: --carryon FOLDER"
            )
    return arms


def _parse(text: str) -> Arm:
    asking = _ASKING.search(text)
    if asking is None:
        return _parse_model(text, text)
    arm = _parse_model(text[: asking.start()] or "base", text)
    given = text[asking.end() :].strip()
    if asking[1] == "instruct" and given:
        return Arm(name=text, model=arm.model, place=arm.place, alpha=arm.alpha, instruction=given)
    if asking[1] == "few-shot" and given.isdecimal() and 1 <= int(given) <= MAX_SHOTS:
        return Arm(name=text, model=arm.model, place=arm.place, alpha=arm.alpha, shots=int(given))
    expected = "instruct:TEXT" if asking[1] == "instruct" else f"few-shot:1 to {MAX_SHOTS}"
    raise InputError(f"arms: expected {expected}, got {text!r}")


def _parse_model(text: str, name: str) -> Arm:
    match = _MODEL.fullmatch(text)
    wrong = InputError(f"arms: expected {FORMS}, got {name!r}")
    if match is None:
        raise wrong
    model: Any = match[1]
    place, alpha = match[2] or "", match[3]
    if (model in ("merged", "lora")) != bool(place) and model != "carryon":
        raise wrong
    if alpha is None:
        return Arm(name=name, model=model, place=place)
    try:
        strength = float(alpha)
    except ValueError:
        strength = -1.0
    if model != "carryon" or not (isfinite(strength) and 0 <= strength <= MAX_ALPHA):
        raise InputError(f"arms: expected carryon@ALPHA with 0 to {MAX_ALPHA:g}, got {name!r}")
    return Arm(name=name, model=model, place=place, alpha=strength)
