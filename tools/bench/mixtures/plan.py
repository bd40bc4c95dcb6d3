"""The steps of experiment-mix as data: commands, each with the file of its result. Pure.

OUT/data/corpus.json          corpus.jsonl: windows of documents, with their half
OUT/stores/BASE.json          BASE: the base's own store, NAME.aligned one aligned to the anchor's
OUT/stores/BASE-bytes.json    held-out targets and bytes of the own store
OUT/seed-S/ARM.json           ARM: a run
OUT/seed-S/ARM-places.json    losses of a mixture where a token of another base is straddled

BASE is `anchor`, `source-1`, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.planned import Planned
from carryon.tools.improve.plan import forward_argv
from carryon.train.config import CarryOnSettings
from carryon.train.modules.taps import middle_taps

ALONE, GATE, GATED = "carryon", "gate", "gate+carryon"
STATE, BOTH = "state", "both"
MIXTURES = (GATE, GATED, STATE, BOTH)
NEEDED = (ALONE, GATE, GATED)
"""Arms without which an experiment says nothing."""
_READING = (STATE, BOTH)
"""Those whose carry-on reads the other bases' states."""
_HEADS = 4
_GATE_BYTES = 4 * (32 + 5 + 1) * 64
"""Of the gate's weights in float32, but those of its states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """What the plan has to know of a base."""

    name: str
    """`anchor`, `source-1`, ...: of its folders and figures."""
    path: str
    num_layers: int
    width: int
    tokenizer: str
    """Digest."""

    @property
    def taps(self) -> list[str]:
        """Taps of its own carry-on: the last state, and that at two thirds of its blocks."""
        return list(dict.fromkeys(["final", middle_taps(self.num_layers)[0]]))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixExperiment:
    """What all steps have in common."""

    root: Path
    bases: Sequence[BaseFacts]
    """The anchor first."""
    data: Sequence[str]
    corpus: str
    seeds: Sequence[int]
    tokens: int
    held_out_tokens: int
    window_tokens: int
    width: int
    """Of the carry-on that is mixed."""
    epochs: int
    patience: int
    tokens_per_step: int
    arms: Sequence[str] = ()
    """Names of those that are trained. Empty: all."""
    forward: ForwardSettings = field(default_factory=ForwardSettings)

    def __post_init__(self) -> None:
        """Refuse what no step would."""
        for name, values, least in (("--bases", self.bases, 2), ("--seeds", self.seeds, 1)):
            if len(values) < least or len(set(values)) != len(values):
                given = " ".join(str(getattr(each, "path", each)) for each in values)
                raise InputError(f"{name}: expected {least} or more, each once, got {given!a}")
        if bool(self.data) == bool(self.corpus):
            raise InputError(
                "--data: expected either --data or --corpus, got "
                f"{'both' if self.data else 'neither'}. Fix: --corpus python"
            )
        if self.width < 2 * _HEADS or self.width % (2 * _HEADS):
            raise InputError(f"--width: expected a multiple of {2 * _HEADS}, got {self.width}")
        named = all_arms(self.bases)
        if unknown := [arm for arm in self.arms if arm not in named]:
            raise InputError(f"--arms: expected {', '.join(named)}, got {unknown[0]!a:.80}")
        if self.arms and (missing := [arm for arm in NEEDED if arm not in self.arms]):
            raise InputError(
                f"--arms: expected {', '.join(NEEDED)} among them, {missing[0]} is not"
            )

    @property
    def anchor(self) -> BaseFacts:
        """The base whose tokens and head are used."""
        return self.bases[0]

    @property
    def trained(self) -> list[str]:
        """Arms in the order in which they are trained."""
        return [arm for arm in all_arms(self.bases) if not self.arms or arm in self.arms]

    @property
    def stored(self) -> list[BaseFacts]:
        """Bases whose own store is needed: the anchor, and those with a carry-on of their own."""
        owners = [base for base in self.bases[1:] if own_arm(base) in self.trained]
        return [self.anchor, *owners]

    @property
    def budget(self) -> int:
        """Bytes of the largest mixture: its gate, and a carry-on that reads all bases."""
        own = carryon_bytes(self.width, len(self.anchor.taps), self.anchor.width)
        bridges = sum(len(each.taps) * each.width * (self.width + 1) for each in self.bases[1:])
        return own + 2 * bridges + _GATE_BYTES + 4 * 32 * sum(each.width for each in self.bases)

    def own_width(self, base: BaseFacts) -> int:
        """Return the width of a base's own carry-on: the least with the bytes of the budget."""
        width = 2 * _HEADS
        while carryon_bytes(width, len(base.taps), base.width) < self.budget:
            width += 2 * _HEADS
        return width


def carryon_bytes(width: int, num_taps: int, base_width: int) -> int:
    """Return the bytes in bfloat16 of a bottleneck of experiment-mix, which has two blocks."""
    inner = _inner(width)
    block = width * (4 * width + 3 * inner + 2)
    ends = num_taps * base_width * (width + 1) + 2 * base_width * width + base_width
    mixer = num_taps * (num_taps * width + 1) if num_taps > 1 else 0
    return 2 * (2 * block + width + ends + mixer)


def _inner(width: int) -> int:
    usual = CarryOnSettings()
    return max(1, round(width * usual.intermediate_size / usual.width))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixPlan:
    """The steps, in order."""

    corpus: Planned
    stores: list[Planned]
    bytes: dict[str, Planned]
    """Base -> held-out targets and bytes of its own store."""
    runs: dict[tuple[int, str], Planned]
    """(seed, arm) -> its training; the arm `own-BASE` is a base with its own carry-on."""
    places: dict[tuple[int, str], Planned]
    """(seed, mixture) -> its losses at straddled positions."""

    def steps(self) -> list[Planned]:
        """Return the steps in the order in which they can run: seed by seed."""
        steps = [self.corpus, *self.stores, *self.bytes.values()]
        for key, run in self.runs.items():
            steps.append(run)
            steps += [self.places[key]] if key in self.places else []
        return steps


def own_arm(base: BaseFacts) -> str:
    """Return the name of the arm that is a base with its own carry-on of equal bytes."""
    return f"own-{base.name}"


def all_arms(bases: Sequence[BaseFacts]) -> list[str]:
    """Return the names of all arms; large bases have the largest heads, so those are last."""
    own, *others = map(own_arm, bases)
    return [ALONE, own, *MIXTURES, *others]


def plan_mix(experiment: MixExperiment) -> MixPlan:
    """Return all steps of an experiment."""
    keys = [(seed, arm) for seed in experiment.seeds for arm in experiment.trained]
    return MixPlan(
        corpus=_corpus(experiment),
        stores=[
            *(_extract(experiment, base, is_aligned=False) for base in experiment.stored),
            *(_extract(experiment, base, is_aligned=True) for base in experiment.bases[1:]),
        ],
        bytes={base.name: _bytes(experiment, base) for base in experiment.stored},
        runs={(seed, arm): _train(experiment, seed, arm) for seed, arm in keys},
        places={
            (seed, arm): _places(experiment, seed, arm) for seed, arm in keys if arm in MIXTURES
        },
    )


def _corpus(experiment: MixExperiment) -> Planned:
    folder = experiment.root / "data"
    argv = ["mix-corpus", "--base", experiment.anchor.path, "--out", str(folder)]
    argv += ["--data", *experiment.data] if experiment.data else ["--corpus", experiment.corpus]
    for name in ("tokens", "held_out_tokens", "window_tokens"):
        argv += [f"--{name.replace('_', '-')}", str(getattr(experiment, name))]
    return Planned(result=folder / "corpus.json", argv=argv)


def _extract(experiment: MixExperiment, base: BaseFacts, *, is_aligned: bool) -> Planned:
    folder = experiment.root / "stores"
    name = f"{base.name}.aligned" if is_aligned else base.name
    argv = ["extract", "--base", base.path, "--out", str(folder / name), "--taps", *base.taps]
    argv += ["--data", str(experiment.root / "data" / "corpus.jsonl")]
    argv += ["--align-to", _store(experiment, experiment.anchor)] if is_aligned else []
    argv += forward_argv(experiment.forward)
    return Planned(result=folder / f"{name}.json", argv=argv)


def _store(experiment: MixExperiment, base: BaseFacts) -> str:
    return str(experiment.root / "stores" / base.name)


def _aligned(experiment: MixExperiment) -> list[str]:
    return [f"{_store(experiment, base)}.aligned" for base in experiment.bases[1:]]


def _bytes(experiment: MixExperiment, base: BaseFacts) -> Planned:
    path = experiment.root / "stores" / f"{base.name}-bytes.json"
    return Planned(result=path, argv=["mix-bytes", "--store", _store(experiment, base)])


def _train(experiment: MixExperiment, seed: int, arm: str) -> Planned:
    own = {own_arm(base): base for base in experiment.bases}
    base = own.get(arm, experiment.anchor)
    width = experiment.own_width(base) if arm in own else experiment.width
    folder = experiment.root / f"seed-{seed}"
    argv = ["train", "--store", _store(experiment, base), "--out", str(folder / arm)]
    if arm in MIXTURES:
        argv += ["--mix", *_aligned(experiment)]
    if arm in _READING:
        taps = [set(base.taps) for base in experiment.bases[1:]]
        common = [tap for tap in experiment.bases[1].taps if all(tap in each for each in taps)]
        argv += ["--mix-by", arm, "--mix-taps", *common]
    if arm == GATE:
        argv += ["--kind", "none"]
    else:
        argv += ["--taps", *base.taps, "--width", str(width)]
        argv += ["--intermediate-size", str(_inner(width)), "--heads", str(_HEADS)]
    argv += ["--seed", str(seed), "--epochs", str(experiment.epochs)]
    argv += ["--patience", str(experiment.patience)]
    argv += ["--tokens-per-step", str(experiment.tokens_per_step)]
    argv += forward_argv(experiment.forward, ("device",))
    return Planned(result=folder / f"{arm}.json", argv=argv)


def _places(experiment: MixExperiment, seed: int, arm: str) -> Planned:
    folder = experiment.root / f"seed-{seed}"
    argv = ["mix-places", "--store", _store(experiment, experiment.anchor)]
    argv += ["--mix", *_aligned(experiment), "--carryon", str(folder / arm / "carryon")]
    argv += forward_argv(experiment.forward, ("device",))
    return Planned(result=folder / f"{arm}-places.json", argv=argv)
