"""Ways of releasing versions, compared on real stores."""

import logging
from pathlib import Path
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.tools.bench.path_plan import ALPHAS, plan_paradigms
from carryon.tools.compare.figure import print_json
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
    TrainSettings,
)
from carryon.train.optim.lr_paths import BRANCH_SCHEDULES, PARADIGMS

logger = logging.getLogger(__name__)

_UNEVEN = 0.05
"""Relative difference allowed between the steps of the mixed order and of the increments."""


def experiment_paths(
    *,
    stores: list[str],
    out: str,
    study: Literal["main", "alpha"] = "main",
    paradigms: list[str] = list(PARADIGMS),  # noqa: B006 -- shown in the help, never changed
    schedules: list[str] = ["cosine"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    alphas: list[float] = [],  # noqa: B006
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> list[dict[str, Any]]:
    """Compare ways of releasing a version for each increment of data: losses and costs.

    Version i is measured on the held-out samples of increments 1 to i. `scratch` trains every
    version from scratch on all data so far. `restart` and `low` continue the last version, with a
    whole schedule or at its final rate. `switch` branches off a trunk that never decays (carryon
    update), `trunk` is that trunk. `wsd-s` continues the decayed branch, `wsm` averages 6
    checkpoints of the trunk. All read the same samples.

    OUT/paths.md and .json hold the tables, OUT/*.png the plots, of all results in OUT. Each figure
    is a JSON line on stdout. The same command resumes.

    Example:
        python -m carryon.tools.bench experiment-paths --stores s1 s2 s3 s4 --out paths \
            --epochs 1 --min-lr-ratio 0.1

    Args:
        stores: Folders of the stores, one for each increment, in order.
        out: Folder of the experiment.
        study: `main` compares paradigms, `alpha` the part of an increment in which a branch decays.
        paradigms: For `main`: some of scratch, restart, low, switch, trunk, wsd-s, wsm.
        schedules: Some of cosine, knee, multistep; replaces --schedule.
        seeds: Seeds of weights and order; replaces --seed.
        alphas: Parts of an increment's steps in which a branch decays. Default: 0.6, and 0.2 to 1
            for `alpha`.
        carryon: Shape of a carry-on.
        optimization: Optimization.
        stream: Data.
        loss: LM-head loss.
        memory: Memory.
        run: Run.
    """
    from carryon.tools.bench.path_runs import PathRuns
    from carryon.tools.bench.paths_report import figures_of, read_results, write_report

    for name, given, known in (
        ("paradigms", paradigms, PARADIGMS),
        ("schedules", schedules, BRANCH_SCHEDULES),
    ):
        if not given or set(given) - set(known):
            raise InputError(f"{name}: expected some of {', '.join(known)}, got {' '.join(given)}")
    if len(stores) < 2:
        raise InputError(f"stores: expected two increments or more, got {len(stores)}")
    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        stream=stream,
        loss=loss,
        memory=memory,
        run=run,
    ).resolved()  # plans compare learning rates
    experiment = PathRuns(root=Path(out), stores=stores, settings=settings)
    experiment.begin()
    lengths = {seed: experiment.lengths(seed) for seed in seeds}
    for steps in lengths.values():
        if abs(steps.so_far[-1] / sum(steps.alone) - 1) > _UNEVEN:
            logger.warning(
                f"all increments mixed: expected {sum(steps.alone)} steps as one after another, "
                f"got {steps.so_far[-1]}, so versions from scratch take other steps than the rest. "
                "Fix: --tokens-per-step of several times the longest sample"
            )
    plan = plan_paradigms(
        lengths,
        kinds=paradigms if study == "main" else ["trunk", "switch"],  # type: ignore[arg-type]
        schedules=schedules,
        alphas=alphas or (ALPHAS if study == "alpha" else [0.6]),
        settings=settings.optimization,
    )
    experiment.run(plan)
    results = read_results(experiment.root)
    write_report(experiment, results, lengths[seeds[0]])
    figures = figures_of(experiment.root.name, results)
    for figure in figures:
        print_json(figure)
    for line in (experiment.root / "paths.md").read_text(encoding="ascii").splitlines():
        logger.info(line)
    return [figure.to_dict() for figure in figures]
