"""The runs of a comparison of paradigms: train segments, measure versions, delete states.

OUT/experiment.json        stores and settings, fixed
OUT/runs/SEGMENT           run folder, until nothing needs its states; the trunk's are kept
OUT/ledger/SEGMENT.json    tokens, targets and seconds at each step whose cost is needed
OUT/results/VERSION.json   held-out NLL on every increment so far, and the version's cost

A version with a result is done. A killed experiment is resumed by the same call.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.files.documents import write_json
from carryon.tools.bench.path_plan import Lengths, PathSegment, Plan, PlannedVersion, State
from carryon.train.config import TrainSettings
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.data.sampler import count_steps
from carryon.train.losses.frozen_head import FrozenHead, place_head
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.saved_settings import refuse_other_settings
from carryon.train.trainer.checkpoint import STATE, WEIGHTS
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import Nll, measure_nlls
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import FREE_SETTINGS, RunFolder
from carryon.train.trainer.trainer import train_segments

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Largest number of runs trained side by side."""
_NEVER = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class PathRuns:
    """An experiment's folder, data and settings."""

    root: Path
    stores: list[str]
    """Folders, one for each increment."""
    settings: TrainSettings
    """Of all runs; a segment has its own schedule and seed."""

    def begin(self) -> None:
        """Write stores and settings to the folder, or check that they are those in it.

        Raises:
            InputError: they differ.
        """
        flat = self.settings.to_flat()
        free = {*FREE_SETTINGS, "schedule", "seed"}
        identity = {key: value for key, value in flat.items() if key not in free}
        identity["stores"] = [self.data((index,)).fingerprints for index in range(len(self.stores))]
        path = self.root / "experiment.json"
        if path.exists():
            begun = json.loads(path.read_text(encoding="ascii"))
            refuse_other_settings(begun, identity, name=str(self.root))
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)

    def data(self, increments: Sequence[int]) -> TrainData:
        """Open the data of some increments, shuffled together."""
        paths = [self.stores[index] for index in increments]
        return open_data(paths, replace(self.settings, stream=self._stream(len(paths))))

    def lengths(self, seed: int) -> Lengths:
        """Return the steps of each increment, and of all up to each."""
        optimization = replace(self.settings.optimization, seed=seed)
        number = range(len(self.stores))
        alone = [self.data((index,)).plan(optimization) for index in number]
        so_far = [self.data(range(index + 1)).plan(optimization) for index in number]
        return Lengths(
            alone=tuple(sum(map(count_steps, epochs)) for epochs in alone),
            so_far=tuple(sum(map(count_steps, epochs)) for epochs in so_far),
        )

    def run(self, plan: Plan) -> None:
        """Train and measure the versions of a plan that have no result."""
        saves = plan.saves()
        while wanted := [each for each in plan.versions if not self.result(each).exists()]:
            if made := [each for each in wanted if self._is_made(each, saves)]:
                self._measure(made)
                self._delete_states(plan, saves)
                continue
            needed = self._needed(plan, wanted, saves)
            ready = [each for each in needed if self._has_start(each)]
            together = [each for each in ready if each.increments == ready[0].increments]
            logger.info(
                f"paths: {len(wanted)} versions and {len(needed)} runs to go; now "
                f"{' '.join(each.name for each in together[:AT_ONCE])}"
            )
            self._train(together[:AT_ONCE], saves)

    def result(self, version: PlannedVersion) -> Path:
        """Return the file of a version's result."""
        return self.root / "results" / f"{version.name}.json"

    def ledger(self, name: str) -> Path:
        """Return the file of a segment's cost."""
        return self.root / "ledger" / f"{name}.json"

    def folder(self, name: str) -> RunFolder:
        """Return the run folder of a segment."""
        return RunFolder(root=self.root / "runs" / name)

    def state(self, state: State) -> Path:
        """Return the step folder of a state."""
        return self.folder(state[0]).checkpoints / f"step-{state[1]:08d}"

    def _stream(self, num_stores: int) -> Any:  # noqa: ANN401 -- StreamSettings
        # All units of all increments in one window, so that new and old samples mix.
        stream = self.settings.stream
        return replace(stream, window_units=stream.window_units * num_stores)

    def _needed(
        self, plan: Plan, wanted: Sequence[PlannedVersion], saves: Mapping[str, Sequence[int]]
    ) -> list[PathSegment]:
        """Return the segments to train for some versions, earlier ones first."""
        names: dict[str, None] = {}

        def add(name: str) -> None:
            segment = plan.segments[name]
            if segment.after is not None and not self._has(segment.after):
                add(segment.after[0])
            names[name] = None

        for version in wanted:
            for state in version.states:
                if not self._has(state):
                    add(state[0])
            for name, _, _ in version.paid:
                if not self._is_counted(name, saves[name]):
                    add(name)
        return [plan.segments[name] for name in names]

    def _train(self, segments: Sequence[PathSegment], saves: Mapping[str, Sequence[int]]) -> None:
        jobs = []
        for segment in segments:
            folder = self.folder(segment.name)
            if self.ledger(segment.name).exists():  # finished, but with other checkpoints
                shutil.rmtree(folder.root, ignore_errors=True)
                self.ledger(segment.name).unlink()
            changes = {
                "schedule": segment.schedule,
                "seed": segment.seed,
                "window_units": self._stream(len(segment.increments)).window_units,
                "evaluate_every": _NEVER,
            }
            start = self.state(segment.after) if segment.after else None
            steps = replace(segment.steps, start=start, saves=tuple(saves[segment.name]))
            settings = self.settings.with_options(**changes)
            jobs.append(Job(out=str(folder.root), settings=settings, segment=steps))
        train_segments([self.stores[index] for index in segments[0].increments], jobs)
        for segment in segments:
            self._count(segment, saves[segment.name])

    def _count(self, segment: PathSegment, steps: Sequence[int]) -> None:
        """Write a segment's ledger from its checkpoints."""
        ledger = {str(segment.steps.first): {"tokens": 0, "targets": 0, "elapsed_s": 0.0}}
        for step in steps:
            path = self.state((segment.name, step)) / STATE
            if not path.exists():  # killed in an experiment that needed fewer: train it again
                shutil.rmtree(self.folder(segment.name).root)
                return
            progress = json.loads(path.read_text(encoding="ascii"))["progress"]
            ledger[str(step)] = {key: progress[key] for key in ledger[str(segment.steps.first)]}
        path = self.ledger(segment.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, ledger)

    def _is_counted(self, name: str, steps: Sequence[int]) -> bool:
        path = self.ledger(name)
        return path.exists() and {str(step) for step in steps} <= set(json.loads(path.read_text()))

    def _has(self, state: State) -> bool:
        return self.ledger(state[0]).exists() and (self.state(state) / STATE).exists()

    def _has_start(self, segment: PathSegment) -> bool:
        return segment.after is None or self._has(segment.after)

    def _is_made(self, version: PlannedVersion, saves: Mapping[str, Sequence[int]]) -> bool:
        return all(map(self._has, version.states)) and all(
            self._is_counted(name, saves[name]) for name, _, _ in version.paid
        )

    def _measure(self, versions: Sequence[PlannedVersion]) -> None:
        """Measure versions one by one, so that a kill loses little."""
        device = pick_device(self.settings.run.device)
        head: FrozenHead | None = None
        for version in versions:
            carryon = self._load(version).to(device)
            nlls: list[Nll] = []
            for index in range(version.number):
                data = self.data((index,))
                head = head or place_head(data.store, self.settings.loss, device=device)
                chunk = pick_chunk(self.settings.loss.chunk_tokens)
                judged = [EvalJob(carryon=carryon, head=head, chunk=chunk)]
                held_out = data.split.held_out
                nlls += measure_nlls(data.store, held_out, judged, stream=self.settings.stream)
            self._write(version, nlls)

    def _load(self, version: PlannedVersion) -> CarryOn:
        """Return a version: the mean of its states, rounded as in a saved carry-on."""
        store = self.data((0,)).store
        carryon = build_carryon(self.settings.carryon, store, seed=0)
        kept = torch.bfloat16 if self.settings.run.saved_dtype == "bfloat16" else torch.float32
        weights = mean_weights([self.state(state) for state in version.states])
        own = carryon.state_dict()
        carryon.load_state_dict(
            {name: weight.to(kept).to(own[name].dtype) for name, weight in weights.items()}
        )
        return carryon

    def _write(self, version: PlannedVersion, nlls: Sequence[Nll]) -> None:
        cost = {"steps": 0, "tokens": 0, "targets": 0, "train_s": 0.0}
        for name, first, stop in version.paid:
            ledger = json.loads(self.ledger(name).read_text(encoding="ascii"))
            before, after = ledger[str(first)], ledger[str(stop)]
            cost["steps"] += stop - first
            cost["tokens"] += after["tokens"] - before["tokens"]
            cost["targets"] += after["targets"] - before["targets"]
            cost["train_s"] += after["elapsed_s"] - before["elapsed_s"]
        targets = [nll.targets for nll in nlls]
        document = {
            "kind": version.kind,
            "schedule": version.schedule,
            "alpha": version.alpha,
            "seed": version.seed,
            "version": version.number,
            "nll": sum(nll.carryon * nll.targets for nll in nlls) / sum(targets),
            "nlls": [nll.carryon for nll in nlls],
            "held_out_targets": targets,
            "mean_of": len(version.states),
        }
        assert not document.keys() & cost.keys(), "the cost would overwrite the loss"
        path = self.result(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document | cost)

    def _delete_states(self, plan: Plan, saves: Mapping[str, Sequence[int]]) -> None:
        """Delete the states that no version needs; the trunk, from which others start, is kept."""
        wanted = [each for each in plan.versions if not self.result(each).exists()]
        needed = {each.name: each for each in self._needed(plan, wanted, saves)}
        kept = {name for version in wanted for name, _ in version.states}
        kept |= {each.after[0] for each in needed.values() if each.after} | set(needed)
        for name, segment in plan.segments.items():
            if name not in kept and segment.steps.paradigm != "trunk":
                shutil.rmtree(self.folder(name).root, ignore_errors=True)


def mean_weights(folders: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of the weights in step folders, summed in float32."""
    first, *others = [load_file(folder / WEIGHTS) for folder in folders]
    total = {name: weight.float() for name, weight in first.items()}
    for weights in others:
        for name, weight in weights.items():
            total[name] += weight.float()
    return {name: weight / len(folders) for name, weight in total.items()}
