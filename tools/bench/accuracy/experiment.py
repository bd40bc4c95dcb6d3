"""`experiment-cot`: what a megabyte that learned from chains of thought does to accuracy.

The steps are commands, planned as data (plan.py) and run once each; the rest is counting.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from carryon.cache.errors import DamagedFileError, InputError
from carryon.cache.files.documents import parse_json
from carryon.cache.lock import folder_lock
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.accuracy.plan import LORA, LORA_RATES, Experiment, TaskPlan, plan_task
from carryon.tools.bench.accuracy.recipes import DEFAULT_RECIPES, Recipe, choose_recipes
from carryon.tools.bench.accuracy.report import HEADING, cells_of, write_report
from carryon.tools.bench.accuracy.rows import Costs, Row, Verdicts, figures_of, make_rows
from carryon.tools.bench.planned import check_steps, run_steps
from carryon.tools.cli.program import Program
from carryon.tools.cli.table import format_table
from carryon.tools.compare.command import read_base_facts
from carryon.tools.compare.figure import describe_core, print_json
from carryon.tools.improve.steps import Step

logger = logging.getLogger(__name__)

OWN_STEPS = Program(
    prog="python -m carryon.tools.bench",
    about="Steps of experiment-cot.",
    closing="",
    commands={
        "cot-templates": "carryon.tools.bench.accuracy.templates:make_problems",
        "cot-corpus": "carryon.tools.bench.accuracy.corpus:make_corpus",
        "cot-mlp": "carryon.tools.bench.accuracy.mlp:train_mlp",
        "cot-lora": "carryon.tools.bench.accuracy.lora:train_lora",
    },
)
"""Besides commands of carryon."""


def experiment_cot(
    *,
    base: str,
    out: str,
    tasks: list[str] = list(DEFAULT_RECIPES),  # noqa: B006 -- shown in the help, never changed
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    num: int = 200,
    samples: int = 0,
    kinds: list[str] = ["bottleneck"],  # noqa: B006
    lora: bool = False,
    shots: int = 4,
    max_new_tokens: int = 0,
    rule: str = "auto",
    epochs: int = 0,
    tokens_per_step: int = 384,
    learning_rate: float = 1e-3,
    lora_rates: list[float] = list(LORA_RATES),  # noqa: B006
    sampled_softmax: int = 2048,
    temperature: float = 0.8,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    batch_rows: int = 64,
    chat_template_kwargs: list[str] = [],  # noqa: B006
    forward: ForwardSettings,
) -> list[dict[str, Any]]:
    """Teach a base chains of thought with carry-ons, and count right answers beside other ways.

    For each task a corpus is made, extracted once, and trained on with each seed by each kind. The
    plain base, the base with an instruction, the base with worked examples, each carry-on and LoRA
    in the same time answer the same unseen problems. Each step is a command, logged as typed; the
    same command resumes, and more --tasks, --seeds, or kinds behind those that are there add rows.

    OUT/table.md, table.json and accuracy.png hold the result, and each figure is a JSON line on
    stdout.

    Example:
        python -m carryon.tools.bench experiment-cot --base HuggingFaceTB/SmolLM2-135M-Instruct
        --out cot --tasks leg_counting --lora

    Args:
        base: The base: hub id, folder or .gguf file.
        out: Folder of the experiment.
        tasks: Recipes: leg_counting, leg_counting-steps (worded for a small base), chain_sum,
            gsm_symbolic, gsm_symbolic-own, gsm_symbolic-templates and gsm_symbolic-own-templates
            (both tested on unseen templates), basic_arithmetic, basic_arithmetic-own,
            letter_counting, simple_equations, chain_sum-chains; each also with settings of its
            task, NAME:SETTING=VALUE,...
        seeds: Seeds of weights and sample order.
        num: Test problems of each task.
        samples: Training problems of each task. 0: as its recipe says.
        kinds: bottleneck (final and two middle layers), mlp (the same without attention), top (the
            base's last blocks by LoRA). The first is measured against the goals and gives the
            clock of LoRA. `top` needs another store, so give it from the start.
        lora: Train LoRA on the whole base too, for as long as extraction and the first kind took.
        shots: Worked answers in the few-shot prompt. 0: no such arm.
        max_new_tokens: Maximum length of an answer, in tokens. 0: as the recipe says.
        rule: Which answers are right, as in carryon score.
        epochs: Passes over the training samples. 0: as the recipe says.
        tokens_per_step: Tokens of a step. Few of them are targets, so small steps learn more.
        learning_rate: Highest learning rate of bottleneck and mlp.
        lora_rates: Those of LoRA: each has the whole clock, the best by held-out loss counts.
        sampled_softmax: As of carryon train.
        temperature: Of the base's own answers that are sampled for training.
        engine: What generates the base's answers. `auto`: vLLM where it is installed.
        batch_rows: Answers that transformers generates at a time; fewer need less memory.
        chat_template_kwargs: Variables for the chat template, each NAME=VALUE, such as
            enable_thinking=false for a base that thinks at length.
        forward: How the base is run.
    """
    least = {"--num": (num, 1), "--samples": (samples, 0), "--shots": (shots, 0)}
    least |= {"--max-new-tokens": (max_new_tokens, 0), "--epochs": (epochs, 0)}
    for name, (value, bound) in least.items():
        if value < bound:
            raise InputError(f"{name}: expected {bound} or more, got {value}")
    recipes = choose_recipes(tasks, samples=samples, max_new_tokens=max_new_tokens, epochs=epochs)
    root = Path(out)
    experiment = Experiment(
        root=root,
        base=base,
        num_layers=int(read_base_facts(base, root, forward=forward)["num_layers"]),
        seeds=seeds,
        num=num,
        kinds=kinds,
        has_lora=lora,
        shots=shots,
        rule=rule,
        tokens_per_step=tokens_per_step,
        learning_rate=learning_rate,
        lora_rates=lora_rates,
        sampled_softmax=sampled_softmax,
        temperature=temperature,
        engine=engine,
        batch_rows=batch_rows,
        chat_template_kwargs=chat_template_kwargs,
        forward=forward,
    )
    plans = [(recipe, plan_task(experiment, recipe)) for recipe in recipes]
    for _, plan in plans:
        check_steps(plan.steps(), own=OWN_STEPS)
    facts = {"base": base, "seeds": seeds, "core": describe_core()}
    rows, documents = list[Row](), list[dict[str, Any]]()
    with folder_lock(root, kind="experiment"):
        for recipe, plan in plans:
            own = _run_task(recipe, plan)
            rows += own
            write_report(root, rows, facts)  # a stopped experiment has its finished tasks
            for figure in figures_of(own, goal=recipe.goal, kind=kinds[0]):
                print_json(figure)
                documents.append(figure.to_dict())
    logger.info(f"\n{format_table([HEADING, *map(cells_of, rows)])}\n{root / 'table.md'}")
    return documents


def _run_task(recipe: Recipe, plan: TaskPlan) -> list[Row]:
    """Run the steps of a task that are not done, and return its rows."""
    done = run_steps(plan.steps(), own=OWN_STEPS)
    scores = [done[step.result].result[0]["arms"] for step in plan.scores.values()]
    by_label = {label: [arms[at] for arms in scores] for at, label in enumerate(plan.labels)}
    counted = {str(each["arm"]): each for arms in scores for each in arms}
    verdicts = read_verdicts(plan.answers, counted)
    return make_rows(
        recipe.name,
        {
            label: [verdicts[arm] for arm in dict.fromkeys(str(each["arm"]) for each in arms)]
            for label, arms in by_label.items()  # the base answers once
        },
        cuts={label: mean(each["cut"] for each in arms) for label, arms in by_label.items()},
        costs=_costs(plan, done),
    )


def read_verdicts(path: Path, counted: Mapping[str, Mapping[str, Any]]) -> dict[str, Verdicts]:
    """Return the verdicts in a file of answers: arm -> problem -> whether it is right.

    Args:
        path: of the answers.
        counted: arm -> its counts in the result of a score, which the file has to confirm.

    Raises:
        DamagedFileError: the file is not that of the scores.
    """
    verdicts: dict[str, dict[str, bool]] = {}
    try:
        with path.open("rb") as file:
            for line in list(file)[1:]:  # behind the settings
                answer = parse_json(line)
                verdicts.setdefault(answer["arm"], {})[answer["id"]] = answer["is_right"]
        for arm, score in counted.items():
            own = verdicts[arm]
            if (len(own), sum(own.values())) != (score["problems"], score["right"]):
                raise ValueError(f"{arm}: another count")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{path}: expected the answers that were scored, got others. Fix: remove it, and "
            f"{path.parent / 'seed-*' / 'score-*.json'}, to answer again"
        ) from error
    return dict(verdicts)


def _costs(plan: TaskPlan, done: Mapping[Path, Step]) -> dict[str, Costs]:
    """Return what each trained arm took, and the loss of the base."""
    from carryon.tools.bench.accuracy.lora import extraction_seconds

    store = Store.open(Path(plan.extract.argv[plan.extract.argv.index("--out") + 1]))
    extract_s = extraction_seconds(store)
    by_label: dict[str, list[dict[str, Any]]] = {}
    for (_, label), step in plan.models.items():
        by_label.setdefault(label, []).append(done[step.result].result)
    costs = {
        label: _mean_costs(results, extract_s=0.0 if label == LORA else extract_s)
        for label, results in by_label.items()
    }
    base_nll = next(iter(by_label.values()))[0]["base_nll"]
    return {"base": Costs(nll=base_nll), **costs}


def _mean_costs(results: Sequence[Mapping[str, Any]], *, extract_s: float) -> Costs:
    first = results[0]
    return Costs(
        bytes=int(first["bytes"] if "bytes" in first else first["carryon_bytes"]),
        extract_s=extract_s,
        train_s=mean(each["train_s"] for each in results),
        tokens=mean(each["tokens"] if "tokens" in each else each["num_tokens"] for each in results),
        nll=mean(
            each["lora_nll"] if "lora_nll" in each else each["carryon_nll"] for each in results
        ),
    )
