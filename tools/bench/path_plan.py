"""The plan of a comparison of paradigms: segments to train, and the versions that they make.

Pure functions. A segment is a part of a path, named by its folder. Segments that several versions
share are planned once: the trunk for all schedules and alphas, and a first part with the trunk's
learning rates (of a Knee) as a part of the trunk. The cost of a version still counts all of them.
Letters: N versions, T steps of an increment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate

from carryon.train.config import OptimizationSettings
from carryon.train.optim.lr_paths import Paradigm, branch_point
from carryon.train.trainer.segment import Segment

NO_SCHEDULE = "constant"
"""Schedule of versions without one."""
MEAN_OF = 6
"""Checkpoints that a `wsm` version averages, evenly spaced over the steps in which a branch would
decay, including the last. Equal weights of checkpoints make a linear decay of the updates."""
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Alphas of the sweep."""
_WORTH = 0.2
"""Part of a segment's steps that must lie on the trunk for it to start there."""

State = tuple[str, int]
"""A segment, and a step of its data's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathSegment:
    """One run: its data, settings and start."""

    name: str
    increments: tuple[int, ...]
    """Counted from 0."""
    schedule: str
    seed: int
    steps: Segment
    """Without its start."""
    after: State | None
    """Its start. None: a new carry-on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedVersion:
    """A version of a paradigm: its states and its cost."""

    kind: Paradigm
    schedule: str
    alpha: float
    """Part of an increment's steps in which a branch decays; 0 for paradigms without one."""
    seed: int
    number: int
    """Counted from 1."""
    states: tuple[State, ...]
    """One, or those that it averages."""
    paid: tuple[tuple[str, int, int], ...]
    """Segments, each from one step to another, beyond those of its predecessor."""

    @property
    def name(self) -> str:
        """Name of its result file."""
        return f"{self.kind}-{self.schedule}-a{self.alpha:g}-s{self.seed}-v{self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Segments to train and versions to measure."""

    segments: dict[str, PathSegment] = field(default_factory=dict)
    versions: list[PlannedVersion] = field(default_factory=list)

    def saves(self) -> dict[str, list[int]]:
        """Return the steps of every segment whose states or cost are needed."""
        states = [state for each in self.versions for state in each.states]
        states += [each.after for each in self.segments.values() if each.after]
        for version in self.versions:
            for name, first, stop in version.paid:
                states += [(name, first), (name, stop)]
        return {
            name: sorted({step for of, step in states if of == name and step > segment.steps.first})
            for name, segment in self.segments.items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Steps of one seed's orders."""

    alone: tuple[int, ...]
    """Steps of each increment."""
    so_far: tuple[int, ...]
    """Steps of each increment mixed with all before it."""


def plan_paradigms(
    lengths: Mapping[int, Lengths],
    *,
    kinds: Sequence[Paradigm],
    schedules: Sequence[str],
    alphas: Sequence[float],
    settings: OptimizationSettings,
) -> Plan:
    """Return the plan of every paradigm, schedule, alpha and seed.

    Args:
        lengths: steps by seed.
        kinds: paradigms.
        schedules: schedules of the decay.
        alphas: parts of an increment's steps in which a branch decays, and from which a `wsm`
            version averages checkpoints.
        settings: of all runs; schedule and seed are replaced.
    """
    plan = Plan()
    for seed, steps in lengths.items():
        for schedule in schedules:
            chosen = replace(settings, schedule=schedule, seed=seed)  # type: ignore[arg-type]
            path = _Paths(plan=plan, lengths=steps, settings=chosen, seed=seed)
            for kind in kinds:
                if kind in ("scratch", "restart", "low"):
                    path.add_from_scratch_or_on(kind)
                elif kind == "trunk":
                    path.add_trunk()
                else:
                    for alpha in alphas:
                        path.add_decay(kind, alpha)
    return plan


@dataclass(frozen=True, kw_only=True, slots=True)
class _Paths:
    """The paths of one seed and schedule, added to a plan."""

    plan: Plan
    lengths: Lengths
    settings: OptimizationSettings
    seed: int

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths.alone))

    def add_from_scratch_or_on(self, kind: Paradigm) -> None:
        """Add the versions of `scratch`, `restart` or `low`; their first is equal."""
        after: State | None = None
        for number in range(1, len(self.lengths.alone) + 1):
            if number == 1 or kind == "scratch":
                steps = self.lengths.so_far[number - 1]
                segment = self._segment("scratch", 1, (steps,), alpha=1.0)
                states, paid = self._own("scratch", number, segment, None, tuple(range(number)))
            else:
                segment = self._segment(kind, number, self._ends[:number], alpha=1.0)
                states, paid = self._own(kind, number, segment, after, (number - 1,))
            after = states
            self._release(kind, number, [states], paid)

    def add_trunk(self) -> None:
        """Add the trunk's ends as versions without decay."""
        for number, length in enumerate(self.lengths.alone, 1):
            name = self._trunk(number)
            self._release("trunk", number, [(name, length)], [(name, 0, length)], schedule=False)

    def add_decay(self, kind: Paradigm, alpha: float) -> None:
        """Add the versions of `switch`, `wsd-s` or `wsm`."""
        before: State | None = None
        for number, length in enumerate(self.lengths.alone, 1):
            branch = branch_point(0, length, alpha=alpha)
            if kind == "wsm":
                name = self._trunk(number)
                falling = length - branch
                marks = {branch + round(part * falling / MEAN_OF) for part in range(1, MEAN_OF + 1)}
                states = [(name, step) for step in sorted(marks)]
                self._release(kind, number, states, [(name, 0, length)], alpha, schedule=False)
                continue
            if kind == "wsd-s" and number > 1:
                segment = self._segment(kind, number, self._ends[:number], alpha=alpha)
                end, _ = self._own(f"a{alpha:g}/{kind}", number, segment, before, (number - 1,))
                self._release(kind, number, [end], [(end[0], 0, length)], alpha)
            else:
                segment = self._segment("switch", number, self._ends[:number], alpha=alpha)
                start = (self._trunk(number), branch) if branch else self._trunk_end(number - 1)
                segment = replace(segment, first=branch)
                end, paid = self._own(f"a{alpha:g}/branch", number, segment, start, (number - 1,))
                head = [(self._trunk(number), 0, branch)] if branch else []
                self._release(
                    kind, number, [end], [*self._tail(number, alpha), *head, *paid], alpha
                )
            before = end

    def _segment(
        self, kind: Paradigm, number: int, ends: tuple[int, ...], *, alpha: float
    ) -> Segment:
        offset = ends[-2] if len(ends) > 1 else 0
        return Segment(
            paradigm=kind,
            version=number,
            ends=ends,
            alpha=alpha,
            first=0,
            stop=ends[-1] - offset,
            offset=offset,
            start=None,
        )

    def _own(
        self, label: str, number: int, segment: Segment, after: State | None, data: tuple[int, ...]
    ) -> tuple[State, list[tuple[str, int, int]]]:
        """Add a segment; start it where its learning rates leave the trunk's, if that pays."""
        name = f"s{self.seed}/{self.settings.schedule}/{label}-{number}"
        paid: list[tuple[str, int, int]] = []
        fork = self._fork(segment, number) if data == (number - 1,) else 0
        is_on_trunk = number == 1 or segment.paradigm == "switch"
        if is_on_trunk and fork - segment.first >= _WORTH * (segment.stop - segment.first):
            after = (self._trunk(number), fork)
            paid.append((after[0], segment.first, fork))
            segment = replace(segment, first=fork)
        paid.append((name, segment.first, segment.stop))
        self.plan.segments[name] = PathSegment(
            name=name,
            increments=data,
            schedule=self.settings.schedule,
            seed=self.seed,
            steps=segment,
            after=after,
        )
        return (name, segment.stop), paid

    def _fork(self, segment: Segment, number: int) -> int:
        """Return the first step whose learning rate differs from the trunk's."""
        trunk = self._segment("trunk", number, self._ends[:number], alpha=1.0)
        step = segment.first
        while step < segment.stop - 1 and segment.rate(step, self.settings) == trunk.rate(
            step, self.settings
        ):
            step += 1
        return step

    def _trunk(self, number: int) -> str:
        """Add the trunk up to an increment's end; return the name of its last segment."""
        name = f"s{self.seed}/trunk-{number}"
        if name not in self.plan.segments:
            after = self._trunk_end(number - 1)
            self.plan.segments[name] = PathSegment(
                name=name,
                increments=(number - 1,),
                schedule=NO_SCHEDULE,
                seed=self.seed,
                steps=self._segment("trunk", number, self._ends[:number], alpha=1.0),
                after=after,
            )
        return name

    def _trunk_end(self, number: int) -> State | None:
        return (self._trunk(number), self.lengths.alone[number - 1]) if number else None

    def _tail(self, number: int, alpha: float) -> list[tuple[str, int, int]]:
        """Return the trunk steps of the previous increment that a version needs."""
        if number == 1:
            return []
        length = self.lengths.alone[number - 2]
        return [(self._trunk(number - 1), branch_point(0, length, alpha=alpha), length)]

    def _release(
        self,
        kind: Paradigm,
        number: int,
        states: Sequence[State],
        paid: Sequence[tuple[str, int, int]],
        alpha: float = 0.0,
        *,
        schedule: bool = True,
    ) -> None:
        version = PlannedVersion(
            kind=kind,
            schedule=self.settings.schedule if schedule else NO_SCHEDULE,
            alpha=alpha,
            seed=self.seed,
            number=number,
            states=tuple(states),
            paid=tuple(paid),
        )
        if version not in self.plan.versions:
            self.plan.versions.append(version)


def steps_by_formula(paradigm: Paradigm, *, versions: int, steps: int, alpha: float) -> Fraction:
    """Return the steps of N versions of T steps each, exactly.

    Args:
        paradigm: how versions follow each other.
        versions: N.
        steps: T.
        alpha: part of an increment's steps in which a branch decays.
    """
    if paradigm == "scratch":
        return Fraction(versions * (versions + 1) * steps, 2)
    if paradigm == "switch":
        # The decimal as written: 0.6 is 3/5, not its nearest binary fraction.
        return versions * steps + Fraction(str(alpha)) * (versions - 1) * steps
    return Fraction(versions * steps)
