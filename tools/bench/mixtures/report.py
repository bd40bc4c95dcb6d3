"""The result of experiment-mix: a row for each arm, its figures, table.md, table.json, losses.png.

Pure but for the files. Losses are nats per byte of held-out text, so that tokenizers compare, and
nats per target; several seeds are shown one by one, and figures take the worst of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import write_json
from carryon.tools.bench.mixtures.plan import (
    ALONE,
    BOTH,
    GATE,
    GATED,
    STATE,
    MixExperiment,
    own_arm,
)
from carryon.tools.compare.figure import Figure
from carryon.train.mixing.mixture_nll import USUAL_GAIN
from carryon.train.plots import draw

LEAST_GATE_GAIN, LEAST_GAIN, MOST_TIE, LEAST_SPEED = 0.20, 0.15, 0.01, 0.7
"""Nats a target, and tokens/s of a mixture against those of its carry-on alone."""
HEADING = ("arm", "nats per byte", "mean", "nats per target", "MB", "steps", "tokens/s", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An arm over all seeds."""

    arm: str
    per_byte: list[float]
    """Of each seed; of a base alone once."""
    per_target: list[float]
    bytes: int = 0
    """Of the weights that are shipped, of one seed."""
    steps: list[int] | None = None
    """Of the weights that were kept, the best on the held-out text."""
    tokens_per_second: list[float] | None = None
    is_mixture: bool = False
    gate_shares: list[dict[str, float]] | None = None
    straddled: list[dict[str, Any]] | None = None
    """Losses of the anchor and of the mixture there."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def make_rows(
    experiment: MixExperiment,
    sizes: Mapping[str, Mapping[str, int]],
    runs: Mapping[tuple[int, str], Mapping[str, Any]],
    places: Mapping[tuple[int, str], Mapping[str, Any]],
) -> list[Row]:
    """Return the rows: each base alone, then each arm that was trained.

    Args:
        experiment: what was run.
        sizes: base -> held-out `targets` and `bytes` of its own store.
        runs: (seed, arm) -> report of the run.
        places: (seed, mixture) -> losses at straddled positions and elsewhere.
    """
    seeds = experiment.seeds
    rows = []
    for base in experiment.stored:
        arm = ALONE if base is experiment.anchor else own_arm(base)
        nll = runs[seeds[0], arm]["base_nll"]
        size = _bytes_per_target(sizes[base.name])
        rows.append(Row(arm=base.name, per_byte=[nll / size], per_target=[nll]))
    store_of = {own_arm(base): base.name for base in experiment.bases}
    for arm in dict.fromkeys(arm for _, arm in runs):
        own = [runs[seed, arm] for seed in seeds]
        size = _bytes_per_target(sizes[store_of.get(arm, experiment.anchor.name)])
        nlls = [each["carryon_nll"] for each in own]
        is_mixture = bool(own[0]["mixture"])
        rows.append(
            Row(
                arm=arm,
                per_byte=[nll / size for nll in nlls],
                per_target=nlls,
                bytes=own[0]["carryon_bytes"] + _gate_bytes(own[0]),
                steps=[each["finished_with_step"] for each in own],
                tokens_per_second=[each["tokens_per_second"] for each in own],
                is_mixture=is_mixture,
                gate_shares=[each["mixture"]["gate_shares"] for each in own]
                if is_mixture
                else None,
                straddled=[places[seed, arm]["straddled"] for seed in seeds]
                if (seeds[0], arm) in places
                else None,
            )
        )
    return rows


def _bytes_per_target(size: Mapping[str, int]) -> float:
    return size["bytes"] / size["targets"]


def _gate_bytes(report: Mapping[str, Any]) -> int:
    """Return the bytes of a mixture's gate, which is saved in float32 beside the carry-on."""
    if not report["mixture"] or not report["mixture"]["gate_shares"]:
        return 0
    of_carryon = int(report["carryon_bytes"]) // 2  # in bfloat16
    return 4 * (int(report["num_parameters"]) - of_carryon)


def figures_of(
    experiment: MixExperiment, rows: Sequence[Row], *, corpus: Mapping[str, Any]
) -> list[Figure]:
    """Return a figure for each arm, and those that have a target."""
    by_arm = {row.arm: row for row in rows}
    anchor = by_arm[experiment.anchor.name].per_target[0]
    names = {base.name: Path(base.path).name for base in experiment.bases}
    shared = {"bases": names, "overlap": corpus["shared_ratio"], "seeds": list(experiment.seeds)}
    figures = [
        Figure(
            figure=f"mix.{row.arm}",
            value=mean(row.per_byte),
            unit="nats per byte of held-out text, mean of the seeds",
            details={key: value for key, value in row.to_dict().items() if key != "arm"},
        )
        for row in rows
    ]

    def gain(arm: str, *below: Sequence[float]) -> list[float]:
        return [
            min(others) - own for own, *others in zip(by_arm[arm].per_target, *below, strict=True)
        ]

    def add(name: str, values: Sequence[float], unit: str, **options: Any) -> None:  # noqa: ANN401
        details = {**shared, "values": list(values), **options.pop("details", {})}
        worst = max(values) if options.get("sense") != "at least" else min(values)
        figures.append(
            Figure(figure=f"mix.{name}", value=worst, unit=unit, details=details, **options)
        )

    target = "nats a target below the {}, least of the seeds"
    gate = [anchor - each for each in by_arm[GATE].per_target]
    add("gate_gain", gate, target.format("anchor"), target=LEAST_GATE_GAIN, sense="at least")
    alone = [by_arm[arm].per_target for arm in (ALONE, own_arm(experiment.anchor)) if arm in by_arm]
    for arm in (STATE, BOTH):
        if arm in by_arm:
            better = gain(arm, *alone)
            unit = target.format("better of the anchor's carry-ons")
            add(f"gain.{arm}", better, unit, sense="at least")
    add(
        "gain",
        gain(GATED, *alone),
        target.format("anchor's carry-on, of its shape or, if trained, of equal bytes"),
        target=LEAST_GAIN,
        sense="at least",
    )
    for arm, row in by_arm.items():
        found = [each for each in row.straddled or () if each["targets"]]
        if found:
            add(
                f"straddled.{arm}",
                [each["mixture_nll"] - each["base_nll"] for each in found],
                "nats a straddled target above the anchor alone, most of the seeds",
                target=0.0,
                details={"targets": found[0]["targets"], "base_nll": found[0]["base_nll"]},
            )
    if all(own_arm(base) in by_arm for base in experiment.bases):
        figures += _against_best(experiment, by_arm, shared)
    ratios = [
        mixed / alone
        for mixed, alone in zip(
            by_arm[GATED].tokens_per_second or (),
            by_arm[ALONE].tokens_per_second or (),
            strict=True,
        )
    ]
    add(
        "speed",
        ratios,
        "of the tokens/s of the same carry-on alone, least of the seeds",
        target=LEAST_SPEED,
        sense="at least",
    )
    return figures


def _against_best(
    experiment: MixExperiment, by_arm: Mapping[str, Row], shared: Mapping[str, Any]
) -> list[Figure]:
    """Return the best mixture against the best base with its own carry-on, per byte."""
    owns = {own_arm(base): by_arm[own_arm(base)].per_byte for base in experiment.bases}
    best_own = min(owns, key=lambda arm: mean(owns[arm]))
    mixtures = [arm for arm in by_arm if by_arm[arm].is_mixture]
    best = min(mixtures, key=lambda arm: mean(by_arm[arm].per_byte))
    differences = [
        own - min(each) for own, *each in zip(by_arm[best].per_byte, *owns.values(), strict=True)
    ]
    details = {**shared, "values": differences, "mixture": best, "best_own": best_own}
    details["own_per_byte"] = {arm: mean(values) for arm, values in owns.items()}
    figures = [
        Figure(
            figure="mix.against_best_own",
            value=max(differences),
            target=0.0,
            unit="nats per byte above the best base with its own carry-on of equal bytes, most of "
            "the seeds",
            details=details,
        )
    ]
    if len({base.tokenizer for base in experiment.bases}) == 1:
        size = by_arm[best].per_target[0] / by_arm[best].per_byte[0]
        figures.append(
            Figure(
                figure="mix.one_tokenizer",
                value=max(differences) * size,
                target=MOST_TIE,
                unit="nats a target above the best base with its own carry-on of equal bytes, most "
                "of the seeds",
                details=details,
            )
        )
    return figures


def warnings_of(figures: Sequence[Figure]) -> list[str]:
    """Return a warning about a gain that bases of one tokenizer hardly ever have."""
    return [
        f"the mixture is {-figure.value:.3f} nats a target better than the best base of one "
        f"tokenizer with its own carry-on; {USUAL_GAIN} is usual. Fix: look for held-out text in "
        "the training half, and train the bases' own carry-ons for longer"
        for figure in figures
        if figure.figure == "mix.one_tokenizer" and -figure.value > USUAL_GAIN
    ]


def cells_of(row: Row) -> list[str]:
    """Return the cells of a row."""
    shares = row.gate_shares or [{}]
    means = {name: mean(each[name] for each in shares) for name in shares[0]}
    return [
        row.arm,
        ", ".join(f"{each:.4f}" for each in row.per_byte),
        f"{mean(row.per_byte):.4f}",
        ", ".join(f"{each:.4f}" for each in row.per_target),
        f"{row.bytes / 1e6:.2f}" if row.bytes else "-",
        ", ".join(map(str, row.steps or ())) or "-",
        f"{mean(row.tokens_per_second):,.0f}" if row.tokens_per_second else "-",
        ", ".join(f"{name} {share:.2f}" for name, share in means.items()) or "-",
    ]


def write_report(
    folder: Path, rows: Sequence[Row], figures: Sequence[Figure], facts: Mapping[str, Any]
) -> bool:
    """Write the table as Markdown and JSON, and the plot; return whether it was drawn."""
    document = {"rows": [row.to_dict() for row in rows], **facts}
    write_json(folder / "table.json", document | {"figures": [each.to_dict() for each in figures]})
    cells = [HEADING, ("---",) * len(HEADING), *map(cells_of, rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    goals = [each for each in figures if each.target is not None]
    told = [
        f"- {each.figure}: {each.value:.4f} {each.unit}; target {each.sense} {each.target:g}: "
        f"{'met' if each.met else 'missed'}"
        for each in goals
    ]
    told += [f"- {name}: {value}" for name, value in facts.items()]
    write_file(folder / "table.md", "\n".join([*lines, "", *told, ""]).encode())

    def panel(axes: Any) -> None:  # noqa: ANN401 -- of matplotlib, which is optional
        at = list(range(len(rows)))
        means = [mean(row.per_byte) for row in rows]
        ends = [
            [middle - min(row.per_byte) for row, middle in zip(rows, means, strict=True)],
            [max(row.per_byte) - middle for row, middle in zip(rows, means, strict=True)],
        ]
        colors = ["C1" if row.is_mixture else "C0" if row.bytes else "0.7" for row in rows]
        axes.bar(at, means, yerr=ends, color=colors, capsize=3)
        axes.set_xticks(at, [row.arm for row in rows], rotation=40, ha="right")
        axes.set(ylabel="nats per byte of held-out text", ylim=(0.9 * min(means), None))

    return draw(folder / "losses.png", panel, width=6)
