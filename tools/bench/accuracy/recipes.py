"""Recipes: how the training texts of a task are made, and what a carry-on is to reach on it.

`chains` writes worked answers (chains.py). `own` samples the base's own answers under an
instruction, or behind some that were right, and keeps those that are right; what was in the prompt
but the question is left out of what is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from carryon.cache.errors import InputError
from carryon.tools.improve.plan import POSED_FOR_EXAMPLES

TRAIN_SEED, TEST_SEED = 1, 1_000_001
"""Problem i of reasoning-gym is drawn from seed + i: the two never meet."""
INSTRUCTION = "Think step by step."


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What the first kind of carry-on is to reach with each seed."""

    against: Literal["nothing", "base", "prompt"]
    """Subtracted from its accuracy: nothing, that of the plain base, or of the best prompt."""
    at_least: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a task is taught and tested."""

    name: str
    """Of the folder and the figures."""
    task: str
    """Of reasoning-gym, with settings."""
    source: Literal["chains", "own"]
    samples: int
    """Training problems."""
    max_new_tokens: int
    """Of every answer, sampled or tested."""
    wording: str = ""
    """Of written chains (chains.py). Empty: that of the generator."""
    instruction: str = INSTRUCTION
    """Behind the question: of the sampled base, and of the prompted arm."""
    answers: int = 4
    """Sampled answers to a problem, for `own`."""
    max_answers: int = 16
    """The same for a problem without a right one."""
    shown: int = 0
    """Problems that are answered under the instruction first. Sets of their right answers are shown
    before the question in place of the instruction, and the best set makes all texts. 0: none."""
    is_hinted: bool = False
    """Tell the base the right answer where it has found none, in the form of those it has found."""
    keep: int = 2
    """Most right ones among them that are kept."""
    form_ratio: float = 0.5
    """Right answers of forms below it are left out, as in `carryon sample`. 0: none."""
    epochs: int = 6
    """Passes over the training texts. Written chains of one form gain from more of them; the base's
    own answers are soon learned by heart."""
    is_by_template: bool = False
    """Test on templates of the generator that training has not seen, and hold out by template."""
    goal: Goal | None = None


_SUMS = "chain_sum:min_terms=3,max_terms=3"
_LEGS = "leg_counting:min_animals=2,max_animals=4"
_ARITHMETIC = "basic_arithmetic:min_terms=2,max_terms=3,min_digits=1,max_digits=2"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="leg_counting", task=_LEGS, source="chains", samples=500, max_new_tokens=192,
            epochs=12, goal=Goal(against="nothing", at_least=0.8),
        ),
        Recipe(
            name="leg_counting-steps", task=_LEGS, source="chains", samples=760,
            max_new_tokens=192, wording="leg_counting-steps", epochs=12,
        ),
        Recipe(
            name="chain_sum", task=_SUMS, source="own", samples=200, max_new_tokens=160,
            answers=2, max_answers=4, shown=POSED_FOR_EXAMPLES, form_ratio=0.0, is_hinted=True,
            goal=Goal(against="prompt", at_least=-0.03),
        ),
        Recipe(
            name="gsm_symbolic", task="gsm_symbolic", source="chains", samples=1000,
            max_new_tokens=320, goal=Goal(against="base", at_least=0.0),
        ),
        Recipe(
            name="gsm_symbolic-own", task="gsm_symbolic", source="own", samples=300,
            max_new_tokens=320, goal=Goal(against="base", at_least=0.0),
        ),
        Recipe(
            name="gsm_symbolic-templates", task="gsm_symbolic", source="chains", samples=1000,
            max_new_tokens=320, is_by_template=True, goal=Goal(against="base", at_least=0.0),
        ),
        Recipe(
            name="gsm_symbolic-own-templates", task="gsm_symbolic", source="own", samples=300,
            max_answers=8, max_new_tokens=320, is_by_template=True, is_hinted=True,
            goal=Goal(against="base", at_least=0.0),
        ),
        Recipe(
            name="basic_arithmetic", task=_ARITHMETIC, source="chains", samples=760,
            max_new_tokens=160,
        ),
        Recipe(
            name="basic_arithmetic-own", task=_ARITHMETIC, source="own", samples=200,
            max_new_tokens=160, answers=2, max_answers=4, shown=POSED_FOR_EXAMPLES, form_ratio=0.0,
            is_hinted=True, goal=Goal(against="prompt", at_least=-0.03),
        ),
        Recipe(
            name="letter_counting", task="letter_counting", source="own", samples=300,
            max_new_tokens=192,
        ),
        Recipe(
            name="simple_equations", task="simple_equations", source="own", samples=300,
            max_new_tokens=256,
        ),
        Recipe(
            name="chain_sum-chains", task=_SUMS, source="chains", samples=760, max_new_tokens=160
        ),
    )
}  # fmt: skip
"""By name."""
DEFAULT_RECIPES = ("leg_counting", "chain_sum", "gsm_symbolic")


def choose_recipes(
    names: Sequence[str], *, samples: int = 0, max_new_tokens: int = 0, epochs: int = 0
) -> list[Recipe]:
    """Return the recipes that names choose, each NAME or NAME:SETTING=VALUE,...; pure.

    Args:
        names: settings take the place of the recipe's own, and are part of its name then.
        samples: training problems of all of them. 0: each recipe's own number.
        max_new_tokens: likewise.
        epochs: likewise.

    Raises:
        InputError: there is no such recipe, or one is named twice.
    """
    chosen = list[Recipe]()
    for text in names:
        name, colon, changes = text.partition(":")
        if name not in RECIPES:
            raise InputError(f"--tasks: expected some of {', '.join(RECIPES)}, got {name!r}")
        recipe = RECIPES[name]
        if colon:
            task = f"{recipe.task.partition(':')[0]}:{changes}"
            folder = f"{name}-{changes.replace('=', '-').replace(',', '-')}"
            recipe = replace(recipe, name=folder, task=task, goal=None)
        chosen.append(
            replace(
                recipe,
                samples=samples or recipe.samples,
                max_new_tokens=max_new_tokens or recipe.max_new_tokens,
                epochs=epochs or recipe.epochs,
            )
        )
    folders = [recipe.name for recipe in chosen]
    if twice := [name for name in folders if folders.count(name) > 1]:
        raise InputError(f"--tasks: expected each once, got {twice[0]} twice")
    return chosen
