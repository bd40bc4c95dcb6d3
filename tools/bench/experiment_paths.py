"""The ways of releasing versions, compared on real stores."""

import json
import logging
from typing import Any, Literal

from carryon.cache.errors import InputError
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)

logger = logging.getLogger(__name__)

_KINDS = ["scratch", "restart", "low", "switch", "trunk", "wsd-s", "wsm"]
_UNEVEN = 0.05
"""Part by which the steps of the mixed order may differ from the increments' own."""


def experiment_paths(
    *,
    stores: list[str],
    out: str,
    study: Literal["main", "alpha", "stage1", "stage2"] = "main",
    paradigms: list[str] = _KINDS,
    schedules: list[str] = ["cosine"],  # noqa: B006 -- shown in the help, never changed
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    alphas: list[float] = [],  # noqa: B006
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    memory: MemorySettings,
    run: RunSettings,
) -> list[dict[str, Any]]:
    """Compare the ways of releasing a version for each increment of data: losses and costs.

    Version i is measured on the held-out samples of increments 1 to i. `scratch` trains every
    version anew on all data so far; `restart` and `low` go on from the last version, with a whole
    schedule or at its end; `switch` branches off a trunk that never falls (carryon update);
    `trunk` never falls; `wsd-s` goes on from the fallen branch; `wsm` takes the mean of 6
    checkpoints of the trunk. All read the same samples, each once an epoch.

    OUT/paths.md and .json hold the tables and OUT/*.png the plots, of this call's results and
    those of earlier ones in OUT; stdout gets a JSON line for each figure. Stop it at any time: the
    same command goes on.

    Example:
        python -m carryon.tools.bench experiment-paths --stores s1 s2 s3 s4 --out paths \
            --epochs 1 --min-lr-ratio 0.1

    Args:
        stores: Folders of the stores, one for each increment, in order.
        out: Folder of the experiment; made if missing. One that is there is gone on with.
        study: `main` compares paradigms, `alpha` sweeps the part of an increment in which a
            branch falls, `stage1` and `stage2` vary the length of the first or the second of two
            stages' falls.
        paradigms: For `main`: some of scratch, restart, low, switch, trunk, wsd-s, wsm.
        schedules: Some of cosine, knee, multistep; instead of --schedule.
        seeds: Of weights and order; instead of --seed.
        alphas: Parts of an increment's steps in which a branch falls. None given: 0.6, and for
            `alpha` 0.2 to 1.
        carryon: The shape of a carry-on.
        optimization: How the carry-on's weights are found.
        stream: What is read from the stores, and how far ahead.
        loss: How the frozen head is multiplied.
        memory: What the weights and all that belongs to them take up.
        run: Where a run computes, and what it leaves behind.
    """
    from pathlib import Path

    from carryon.tools.bench.path_plan import ALPHAS, plan_paradigms, plan_pilots, trunk_saves
    from carryon.tools.bench.path_runs import PathRuns
    from carryon.tools.bench.paths_report import figures_of, read_results, write_report
    from carryon.train.config import TrainSettings
    from carryon.train.optim.lr_paths import BRANCH_SCHEDULES

    for name, given, known in (
        ("paradigms", paradigms, _KINDS),
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
    optimization = settings.optimization
    experiment = PathRuns(root=Path(out), stores=stores, settings=settings)
    experiment.begin()
    lengths = {seed: experiment.lengths(seed) for seed in seeds}
    for steps in lengths.values():
        if abs(steps.so_far[-1] / sum(steps.alone) - 1) > _UNEVEN:
            logger.warning(
                f"all increments mixed make {steps.so_far[-1]} steps, one after another "
                f"{sum(steps.alone)}: versions from scratch take other steps than the rest; give "
                "--tokens-per-step of several times the longest sample"
            )
    if study in ("stage1", "stage2"):
        plan = plan_pilots(lengths, kind=study, schedules=schedules, settings=optimization)
    else:
        plan = plan_paradigms(
            lengths,
            kinds=paradigms if study == "main" else ["trunk", "switch"],  # type: ignore[arg-type]
            schedules=schedules,
            alphas=alphas or (ALPHAS if study == "alpha" else [0.6]),
            settings=optimization,
        )
    experiment.run(plan, trunk_saves(lengths, optimization))
    results = read_results(experiment.root)
    write_report(experiment, results, lengths[seeds[0]])
    figures = [figure.to_dict() for figure in figures_of(experiment.root.name, results)]
    for figure in figures:
        print(json.dumps(figure))
    logger.info((experiment.root / "paths.md").read_text(encoding="ascii"))
    return figures
