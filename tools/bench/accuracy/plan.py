"""The steps of experiment-cot as data: commands, each with the file of its result. Pure.

OUT/TASK/problems.json          problems.jsonl and test.jsonl, where templates are held out
OUT/TASK/examples.json          examples.jsonl, where own answers are shown in prompts
OUT/TASK/corpus.json            corpus.jsonl, and shown.jsonl: the best set of examples
OUT/TASK/hinted.json            hinted.jsonl, if there are answers after all, told what is right
OUT/TASK/extract.json           store: of all kinds and seeds
OUT/TASK/seed-S/KIND.json       KIND: a run
OUT/TASK/seed-S/lora.json       lora: an adapter for PEFT, at the clock of the first kind
OUT/TASK/seed-S/score-....json  counts of all arms; OUT/TASK/answers.jsonl has the answers
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.accuracy.recipes import TEST_SEED, TRAIN_SEED, Recipe
from carryon.tools.bench.planned import Planned
from carryon.tools.compare.settings import LORA_RANK
from carryon.tools.improve.plan import (
    ANSWERS_FOR_EXAMPLES,
    EXAMPLE_SETS,
    HINT,
    forward_argv,
)
from carryon.train.modules.taps import middle_taps

MLP = "mlp"
READABLE = "as-bottleneck"
"""Folder in the run of an `mlp`: the carry-on for other programs."""
KINDS = ("bottleneck", MLP, "top")
LORA = "lora"
LORA_RATES = (2e-4, 5e-4, 2e-3)
"""Learning rates to choose from: many steps want a small one, the few of a short clock a large."""
PROMPTED = ("instruct", "few-shot")
"""Arms of the base that are asked in another way."""
_MOST_TOP_BLOCKS = 8
_TOP_PASSES = 1 / 4
"""Of a `top` for each of the others: one teaches it more, in six to fourteen times the seconds."""
_SHOTS = 4
"""Own answers in a prompt."""
_HELD_OUT_TEMPLATES = 0.1
"""Of the templates of training: a twentieth, as of other problems, would be two or three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """What all tasks have in common."""

    root: Path
    base: str
    num_layers: int
    """Blocks of the base."""
    seeds: Sequence[int]
    num: int
    """Test problems of a task."""
    kinds: Sequence[str]
    has_lora: bool
    shots: int
    """Worked answers in a few-shot prompt. 0: no such arm."""
    rule: str
    tokens_per_step: int
    learning_rate: float
    lora_rates: Sequence[float]
    sampled_softmax: int
    temperature: float
    """Of sampled training answers."""
    engine: str
    batch_rows: int
    chat_template_kwargs: Sequence[str]
    forward: ForwardSettings = field(default_factory=ForwardSettings)

    def __post_init__(self) -> None:
        """Refuse what no step would."""
        for name, values, known in (("--kinds", self.kinds, KINDS), ("--seeds", self.seeds, None)):
            if not values or len(set(values)) != len(values):
                given = " ".join(map(str, values))
                raise InputError(f"{name}: expected one or more, each once, got {given!a}")
            if known and (wrong := [value for value in values if value not in known]):
                raise InputError(f"{name}: expected some of {', '.join(known)}, got {wrong[0]!a}")
        if self.has_lora and self.kinds[0] == "top":
            raise InputError(
                "--kinds: expected another kind before top with --lora, whose clock is that of the "
                "first. Fix: --kinds bottleneck top"
            )

    @property
    def taps(self) -> list[str]:
        """Taps of `bottleneck` and `mlp`."""
        return list(dict.fromkeys(["final", *middle_taps(self.num_layers)]))

    @property
    def top_blocks(self) -> int:
        """Blocks that a `top` copies."""
        return max(1, min(_MOST_TOP_BLOCKS, self.num_layers - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
    """The steps of a task, in order."""

    problems: Planned | None
    """Of other templates than the test."""
    examples: Planned | None
    """Own answers to show in prompts."""
    corpus: Planned
    hinted: Planned | None
    """Answers to problems without a right one, which the base is told."""
    extract: Planned
    models: dict[tuple[int, str], Planned]
    """(seed, kind or `lora`) -> its training."""
    scores: dict[int, Planned]
    """Seed -> the counts of its models beside the base."""
    labels: list[str]
    """Of the arms of each score, in their order."""
    answers: Path

    def steps(self) -> list[Planned]:
        """Return the steps in the order in which they can run: seed by seed."""
        steps = [step for step in (self.problems, self.examples) if step]
        steps += [step for step in (self.corpus, self.hinted, self.extract) if step]
        for seed, score in self.scores.items():
            steps += [step for (own, _), step in self.models.items() if own == seed]
            steps.append(score)
        return steps


def plan_task(experiment: Experiment, recipe: Recipe) -> TaskPlan:
    """Return the steps of a task."""
    folder = experiment.root / recipe.name
    models = {
        (seed, kind): _train(experiment, recipe, folder, seed, kind)
        for seed in experiment.seeds
        for kind in experiment.kinds
    }
    if experiment.has_lora:
        models |= {(seed, LORA): _train_lora(experiment, folder, seed) for seed in experiment.seeds}
    prompted = [f"instruct:{recipe.instruction}"]
    prompted += [f"few-shot:{experiment.shots}"] if experiment.shots else []
    names = [*experiment.kinds, *[LORA] * experiment.has_lora]
    return TaskPlan(
        problems=_make_problems(experiment, recipe, folder) if recipe.is_by_template else None,
        examples=_sample_examples(experiment, recipe, folder) if recipe.shown else None,
        corpus=_make_corpus(experiment, recipe, folder),
        hinted=_sample_hinted(experiment, recipe, folder) if recipe.is_hinted else None,
        extract=_extract(experiment, recipe, folder),
        models=models,
        scores={
            seed: _score(experiment, recipe, folder, seed, ["base", *prompted])
            for seed in experiment.seeds
        },
        labels=["base", *PROMPTED[: len(prompted)], *names],
        answers=folder / "answers.jsonl",
    )


def _make_problems(experiment: Experiment, recipe: Recipe, folder: Path) -> Planned:
    argv = ["cot-templates", "--task", recipe.task, *_seeds(experiment)]
    argv += ["--samples", str(recipe.samples), "--out", str(folder / "problems.jsonl")]
    argv += ["--test-out", str(folder / "test.jsonl")]
    return Planned(result=folder / "problems.json", argv=argv)


def _make_corpus(experiment: Experiment, recipe: Recipe, folder: Path) -> Planned:
    path, result = folder / "corpus.jsonl", folder / "corpus.json"
    source, wording = _source(experiment, recipe, folder), recipe.wording
    if recipe.source == "chains":
        argv = ["cot-corpus", "--task", source[0], "--samples", str(recipe.samples), *source[1:]]
        wording = wording or (recipe.task if recipe.is_by_template else "")
        argv += ["--out", str(path), *(["--wording", wording] if wording else [])]
        return Planned(result=result, argv=argv)
    argv = ["--num", str(recipe.samples), "--samples", str(recipe.answers)]
    argv += ["--max-samples", str(recipe.max_answers), "--form-ratio", f"{recipe.form_ratio:g}"]
    argv += ["--keep", str(recipe.keep)]
    if recipe.shown:
        argv += ["--shots", str(_SHOTS), "--examples", str(folder / "examples.jsonl")]
        argv += ["--example-sets", str(EXAMPLE_SETS), "--examples-out", str(_shown(folder))]
    else:
        argv += ["--instruction", recipe.instruction]
    return Planned(result=result, argv=_sample(experiment, recipe, folder, path, argv))


def _sample_examples(experiment: Experiment, recipe: Recipe, folder: Path) -> Planned:
    argv = ["--num", str(recipe.shown), "--samples", str(ANSWERS_FOR_EXAMPLES), "--keep", "1"]
    argv += ["--instruction", recipe.instruction]
    argv = _sample(experiment, recipe, folder, folder / "examples.jsonl", argv)
    return Planned(result=folder / "examples.json", argv=argv)


def _sample_hinted(experiment: Experiment, recipe: Recipe, folder: Path) -> Planned:
    corpus, out = folder / "corpus.jsonl", folder / "hinted.jsonl"
    argv = ["--num", str(recipe.samples), "--samples", "1", "--keep", "1"]
    argv += ["--known", str(corpus), "--unsolved", "--hint", HINT, "--shots", str(_SHOTS)]
    argv += ["--examples", str(_shown(folder) if recipe.shown else corpus)]
    argv = _sample(experiment, recipe, folder, out, argv, temperature=0.0)
    return Planned(result=folder / "hinted.json", argv=argv, may_lack=out)


def _shown(folder: Path) -> Path:
    """Return the file of the examples that made the texts."""
    return folder / "shown.jsonl"


def _sample(
    experiment: Experiment,
    recipe: Recipe,
    folder: Path,
    out: Path,
    asked: Sequence[str],
    *,
    temperature: float | None = None,
) -> list[str]:
    temperature = experiment.temperature if temperature is None else temperature
    argv = ["sample", "--base", experiment.base, "--data" if recipe.is_by_template else "--tasks"]
    argv += [*_source(experiment, recipe, folder), "--out", str(out), *asked]
    argv += ["--temperature", f"{temperature:g}", *_answering(experiment, recipe)]
    return argv


def _source(experiment: Experiment, recipe: Recipe, folder: Path) -> list[str]:
    """Return the task or file of the training problems, and options of how they are drawn."""
    if not recipe.is_by_template:
        return [recipe.task, *_seeds(experiment)]
    source = [str(folder / "problems.jsonl"), "--test-num", "0"]
    return [*source, "--held-out-ratio", f"{_HELD_OUT_TEMPLATES:g}"]


def _seeds(experiment: Experiment) -> list[str]:
    """Return the options that draw problems for training and for the test."""
    test = ["--test-num", str(experiment.num), "--test-seed", str(TEST_SEED)]
    return ["--task-seed", str(TRAIN_SEED), *test]


def _extract(experiment: Experiment, recipe: Recipe, folder: Path) -> Planned:
    argv = ["extract", "--base", experiment.base, "--data", str(folder / "corpus.jsonl")]
    argv += [str(folder / "hinted.jsonl")] * recipe.is_hinted
    argv += ["--out", str(folder / "store"), "--taps"]
    if "top" not in experiment.kinds:
        argv += experiment.taps
    else:
        blocks = experiment.top_blocks
        below = f"layer.{experiment.num_layers - blocks}"
        argv += [*dict.fromkeys([*experiment.taps, below]), "--with-blocks", str(blocks)]
    argv += _template(experiment) + forward_argv(experiment.forward)
    return Planned(result=folder / "extract.json", argv=argv)


def _train(experiment: Experiment, recipe: Recipe, folder: Path, seed: int, kind: str) -> Planned:
    own = folder / f"seed-{seed}"
    argv, epochs = ["cot-mlp"] if kind == MLP else ["train", "--kind", kind], recipe.epochs
    argv += ["--store", str(folder / "store"), "--out", str(own / kind)]
    if kind == "top":  # at the learning rate of its kind
        epochs = math.ceil(_TOP_PASSES * epochs)
        argv += ["--blocks", str(experiment.top_blocks), "--lora-rank", str(LORA_RANK)]
    else:
        argv += ["--taps", *experiment.taps, "--learning-rate", f"{experiment.learning_rate:g}"]
    argv += ["--seed", str(seed), "--epochs", str(epochs)]
    argv += ["--tokens-per-step", str(experiment.tokens_per_step)]
    argv += ["--sampled-softmax", str(experiment.sampled_softmax)]
    argv += forward_argv(experiment.forward, ("device",))
    return Planned(result=own / f"{kind}.json", argv=argv)


def _train_lora(experiment: Experiment, folder: Path, seed: int) -> Planned:
    own = folder / f"seed-{seed}"
    argv = ["cot-lora", "--base", experiment.base, "--store", str(folder / "store")]
    argv += ["--run", str(own / experiment.kinds[0]), "--out", str(own / LORA)]
    argv += ["--seed", str(seed), "--learning-rates"]
    argv += [f"{rate:g}" for rate in experiment.lora_rates]
    argv += ["--tokens-per-step", str(experiment.tokens_per_step)]
    argv += ["--sampled-softmax", str(experiment.sampled_softmax)]
    return Planned(result=own / "lora.json", argv=argv + forward_argv(experiment.forward))


def _score(
    experiment: Experiment, recipe: Recipe, folder: Path, seed: int, asked: Sequence[str]
) -> Planned:
    own = folder / f"seed-{seed}"
    trained = {
        kind: f"carryon={own / kind / (READABLE if kind == MLP else 'carryon')}"
        for kind in experiment.kinds
    }
    trained |= {LORA: f"lora={own / LORA}"} if experiment.has_lora else {}
    source = str(folder / "test.jsonl") if recipe.is_by_template else recipe.task
    argv = ["score", "--base", experiment.base, "--tasks", source]
    argv += ["--arms", *asked, *trained.values(), "--num", str(experiment.num)]
    argv += ["--task-seed", str(TEST_SEED)]
    if experiment.shots:
        has_set = recipe.shown and experiment.shots <= _SHOTS
        argv += ["--examples", str(_shown(folder) if has_set else folder / "corpus.jsonl")]
    argv += ["--store", str(folder / "store"), "--out", str(folder / "answers.jsonl")]
    argv += _answering(experiment, recipe)
    return Planned(result=own / f"score-{'-'.join(trained)}.json", argv=argv)


def _answering(experiment: Experiment, recipe: Recipe) -> list[str]:
    """Return the options of what generates and judges."""
    argv = ["--max-new-tokens", str(recipe.max_new_tokens)]
    argv += ["--rule", experiment.rule] if experiment.rule != "auto" else []
    argv += ["--engine", experiment.engine] if experiment.engine != "auto" else []
    argv += ["--batch-rows", str(experiment.batch_rows)]
    return argv + _template(experiment) + forward_argv(experiment.forward)


def _template(experiment: Experiment) -> list[str]:
    given = experiment.chat_template_kwargs
    return ["--chat-template-kwargs", *given] if given else []
