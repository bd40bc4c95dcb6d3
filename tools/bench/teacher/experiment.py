"""`experiment-teacher`: a carry-on trained with a teacher of the same tokenizer, and without.

OUT/experiment.json             the stores and settings that every result in OUT shares
OUT/student.json                loss of the student alone
OUT/teachers/NAME.json, .f16    losses of a teacher, and its log-probabilities: `bare`, `carryon`
OUT/seed-S/ARM.json             losses of a run: `no-teacher`, `bare-W`, `carryon-W`
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_object, write_json
from carryon.cache.files.regular import digest_file
from carryon.cache.lock import folder_lock
from carryon.cache.store.reader import Store
from carryon.tools.bench.teacher.join import Joined, check_teacher_carryon, join_stores
from carryon.tools.bench.teacher.log_probs import LogProbFile, num_bytes, write_log_probs
from carryon.tools.bench.teacher.report import (
    BARE,
    NO_TEACHER,
    OWN,
    STUDENT,
    arm_name,
    figures_of,
    write_report,
)
from carryon.tools.bench.teacher.training import train_student
from carryon.tools.compare.figure import describe_core, print_json
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    OptimizationSettings,
    RunSettings,
    TrainSettings,
)
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.losses.frozen_head import FrozenHead, place_head
from carryon.train.modules.card_file import CARD
from carryon.train.modules.serialization import load_carryon, locate_carryon
from carryon.train.modules.taps import check_taps, stream_taps
from carryon.train.saved_settings import refuse_other_settings
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.nll import measure_nlls, warn_if_few

logger = logging.getLogger(__name__)
_CHUNK = 512


def experiment_teacher(
    *,
    store: str,
    teacher: str,
    teacher_carryon: str,
    out: str,
    weight: list[float] = [0.5],  # noqa: B006 -- shown in the help, never changed
    temperature: float = 1.0,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    evaluate_every: int = 0,
    device: str = "auto",
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
) -> list[dict[str, Any]]:
    """Train a student's carry-on without a teacher, with a bare one, and with one that has its own.

    Both stores hold the same tokens, which is checked. Runs of one seed start from the same
    weights and take the same steps over the same samples, in float32. With a teacher the loss is
    (1 - W) CE + W T^2 KL(teacher || student), over the whole vocabulary. Each teacher's
    log-probabilities at the training targets are computed once and kept in OUT: 2 bytes for each
    target and token of the vocabulary. The same command resumes, run by run.

    OUT/table.md and table.json hold the held-out losses, at the best evaluation and at the end.
    Each figure is a JSON line on stdout; it takes the best evaluation of each run.

    Example:
        python -m carryon.tools.bench experiment-teacher --store small --teacher large
        --teacher-carryon large-run/carryon --out teacher

    Args:
        store: Folder of the student's store.
        teacher: Folder of the teacher's store: the same texts, and a base of the same tokenizer.
        teacher_carryon: Folder of a carry-on that was trained on the teacher's store.
        out: Folder of the experiment.
        weight: W, one or several, above 0 and up to 1.
        temperature: T, above 0.
        seeds: Seeds of weights and sample order; replaces --seed.
        evaluate_every: Steps between evaluations. 0: at the end of each epoch.
        device: `auto`, `cpu`, `cuda`, ...
        carryon: Shape of the student's carry-on.
        optimization: Optimization.
    """
    for name, values, most in (("weight", weight, 1.0), ("temperature", [temperature], 1e3)):
        if not values or len(set(values)) != len(values) or not all(0 < x <= most for x in values):
            given = " ".join(map(str, values))
            raise InputError(f"{name}: expected above 0 and up to {most:g}, each once, got {given}")
    if not seeds or len(set(seeds)) != len(seeds) or evaluate_every < 0:
        raise InputError("seeds, evaluate_every: expected each seed once, and steps of 0 or more")
    settings = TrainSettings(
        carryon=carryon,
        optimization=optimization,
        run=RunSettings(evaluate_every=evaluate_every),
    )
    data = open_data([store], settings)
    assert isinstance(data.store, Store)
    student, its = data.store, Store.open(teacher)
    folder = locate_carryon(teacher_carryon)
    experiment = Experiment(
        root=Path(out),
        data=data,
        settings=data.resolve(settings),
        student=student,
        teacher=its,
        carryon=folder,
        joined=join_stores(student, its, train=data.split.train),
        temperature=temperature,
        device=pick_device(device),
    )
    with folder_lock(experiment.root, kind="experiment"):
        experiment.begin()
        bases = experiment.measure_bases()
        runs = experiment.train(weight, seeds)
        facts = {
            "student": str(student.base.get("id")),
            "teacher": str(its.base.get("id")),
            "training_targets": len(experiment.joined.rows),
            "held_out_targets": bases[STUDENT]["held_out_targets"],
            "temperature": temperature,
        }
        figures = figures_of(runs, weights=weight, seeds=seeds, details=facts)
        facts["core"] = describe_core()
        logger.info(write_report(experiment.root, runs, bases, figures, facts))
    for figure in figures:
        print_json(figure)
    return [figure.to_dict() for figure in figures]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Experiment:
    """What all runs have in common."""

    root: Path
    data: TrainData
    settings: TrainSettings
    student: Store
    teacher: Store
    carryon: Path
    """Folder of the teacher's carry-on."""
    joined: Joined
    temperature: float
    device: torch.device

    def begin(self) -> None:
        """Refuse a teacher that has seen held-out samples, and another experiment's folder."""
        module, card = load_carryon(self.carryon, blocks=self.teacher.blocks)
        held_out = self.data.split.held_out
        check_teacher_carryon(card, self.teacher, self.joined, held_out=held_out)
        check_taps(self.teacher, stream_taps(module.settings))
        identity = {
            "student": self.student.fingerprint,
            "teacher": self.teacher.fingerprint,
            "teacher_carryon": digest_file(self.carryon / CARD),
            "temperature": self.temperature,
            "evaluate_every": self.settings.run.evaluate_every,
            **self.settings.carryon.to_dict(),
            **self.settings.optimization.to_dict(),
        }
        del identity["seed"]
        path = self.root / "experiment.json"
        refuse_other_settings(_kept(path, lambda: identity), identity, name=str(self.root))

    def measure_bases(self) -> dict[str, dict[str, Any]]:
        """Return the losses of the student and of both teachers.

        Afterwards the teachers' log-probabilities are in files.
        """
        found = {STUDENT: _kept(self.root / "student.json", self._measure_student)}
        vocab_size = int(self.teacher.manifest.head["vocab_size"])
        size = num_bytes(self.joined, vocab_size)
        for name in (BARE, OWN):
            path = self._log_probs(name)
            if not path.with_suffix(".json").exists():
                logger.info(
                    f"{path}: {len(self.joined.rows):,} training targets x {vocab_size:,} tokens "
                    f"in float16: {size / 1e9:.2f} GB"
                )
            found[name] = _kept(path.with_suffix(".json"), partial(self._measure_teacher, name))
        return found

    def _measure_student(self) -> dict[str, Any]:
        job = EvalJob(carryon=None, head=self._head(self.student), chunk=_CHUNK, with_base=True)
        [nll] = measure_nlls(
            self.student, self.data.split.held_out, [job], stream=self.data.settings
        )
        warn_if_few(nll.targets)
        return {"held_out_nll": nll.base, "held_out_targets": nll.targets}

    def _measure_teacher(self, name: str) -> dict[str, Any]:
        module, card = load_carryon(self.carryon, blocks=self.teacher.blocks)
        module, alpha = module.to(self.device), card.alpha if name == OWN else 0.0
        head = self._head(self.teacher)
        train_nll = write_log_probs(
            self._log_probs(name),
            self.teacher,
            self.joined,
            train=self.data.split.train,
            carryon=module if name == OWN else None,
            alpha=alpha,
            head=head,
        )
        job = EvalJob(carryon=module, head=head, chunk=_CHUNK, alpha=alpha)
        samples = np.sort(self.joined.samples[self.data.split.held_out])
        [nll] = measure_nlls(self.teacher, samples, [job], stream=self.data.settings)
        return {"train_nll": train_nll, "held_out_nll": nll.carryon}

    def train(self, weights: list[float], seeds: list[int]) -> dict[tuple[int, str], Any]:
        """Train what has no result yet, and return all results by seed and arm."""
        head, runs = self._head(self.student), {}
        arms = [(NO_TEACHER, 0.0), *((kind, each) for each in weights for kind in (BARE, OWN))]
        for seed in seeds:
            for kind, weight in arms:
                arm = arm_name(kind, weight)
                path = self.root / f"seed-{seed}" / f"{arm}.json"
                run = _kept(path, partial(self._train, seed, kind, weight, head))
                logger.info(
                    f"seed {seed}, {arm}: held-out NLL {run['best_nll']:.4f} after step "
                    f"{run['best_step']}, {run['last_nll']:.4f} at the end; {run['seconds']:,.0f} s"
                )
                runs[seed, arm] = run
        return runs

    def _train(self, seed: int, kind: str, weight: float, head: FrozenHead) -> dict[str, Any]:
        teacher = LogProbFile(
            path=self._log_probs(kind), rows=self.joined.rows, vocab_size=head.vocab_size
        )
        optimization = replace(self.settings.optimization, seed=seed)
        return train_student(
            self.data,
            replace(self.settings, optimization=optimization),
            head=head,
            teacher=None if kind == NO_TEACHER else teacher,
            weight=weight,
            temperature=self.temperature,
        )

    def _head(self, store: Store) -> FrozenHead:
        return place_head(store, LossSettings(head_dtype="float32"), device=self.device)

    def _log_probs(self, name: str) -> Path:
        return self.root / "teachers" / f"{name}.f16"


def _kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the document at `path`, written now if it is not there."""
    if not path.exists():
        write_json(path, compute())
    return read_object(path)
