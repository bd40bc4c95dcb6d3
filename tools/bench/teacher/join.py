"""Two stores of the same tokens, joined by sample id.

Letters: S samples of the student, R samples of the teacher, P supervised positions of training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.store.reader import Store
from carryon.train.data.split import split_of
from carryon.train.modules.card import CarryOnCard, check_base


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Joined:
    """Where the teacher's samples lie in the student's store."""

    samples: NDArray[np.int64]
    """[S] the teacher's sample of each of the student's."""
    starts: NDArray[np.int64]
    """[R] first row in the student's store of each of the teacher's samples; -1: it has none."""
    rows: NDArray[np.int64]
    """[P] rows of the student's store whose next token is a training target, ascending."""


def join_stores(student: Store, teacher: Store, *, train: NDArray[np.int64]) -> Joined:
    """Join stores after comparing every token and loss mask of the student's samples.

    Args:
        student: whose targets are trained on.
        teacher: of a base with the same tokenizer; it may hold more samples.
        train: the student's training samples.

    Raises:
        SettingMismatchError: another tokenizer, or a head of another vocabulary.
        InputError: a sample is missing, or its tokens or targets are others; names it.
    """
    facts: dict[str, Callable[[Store], str]] = {
        "the tokenizer": lambda store: str(store.base.get("tokenizer_sha256"))[:12],
        "a head of the vocabulary": lambda store: str(store.manifest.head["vocab_size"]),
    }
    for name, of in facts.items():
        if of(student) != of(teacher):
            raise SettingMismatchError(
                f"teacher: {teacher.name}: expected {name} of {student.name}, {of(student)}, got "
                f"{of(teacher)}. Fix: a store of a base of the same family"
            )
    places = {teacher.sample_id(sample): sample for sample in range(teacher.num_samples)}
    starts = np.full(teacher.num_samples, -1, dtype=np.int64)
    is_trained = np.isin(np.arange(student.num_samples), train)
    samples, rows = [], [np.zeros(0, dtype=np.int64)]
    for sample in range(student.num_samples):
        own = student.read_sample(sample, taps=[])
        if own.id not in places:
            raise InputError(
                f"teacher: {teacher.name}: expected every sample of {student.name}, {own.id!a:.80} "
                "is missing. Fix: extract it from the same --data"
            )
        other = teacher.read_sample(places[own.id], taps=[])
        for name, mine, its in (
            ("tokens", own.tokens, other.tokens),
            ("targets", own.loss_mask, other.loss_mask),
        ):
            if not np.array_equal(mine, its):
                raise InputError(
                    f"teacher: {teacher.name}: sample {own.id!a:.80}: expected the {name} of "
                    f"{student.name}, got others. Fix: extract both from the same --data, with the "
                    "same corpus settings"
                )
        samples.append(places[own.id])
        start = int(student.sample_starts[sample])
        starts[places[own.id]] = start
        if is_trained[sample]:
            rows.append(start + np.flatnonzero(own.loss_mask[1:] == 1))
    return Joined(
        samples=np.array(samples, dtype=np.int64), starts=starts, rows=np.concatenate(rows)
    )


def check_teacher_carryon(
    card: CarryOnCard, teacher: Store, joined: Joined, *, held_out: NDArray[np.int64]
) -> None:
    """Refuse a teacher's carry-on that may have been trained on the student's held-out samples.

    Args:
        card: of the carry-on.
        teacher: the store whose states it corrects.
        joined: the stores.
        held_out: the student's held-out samples.

    Raises:
        SettingMismatchError: it is of another base.
        InputError: it was trained on another store, or on a sample that is held out here.
    """
    check_base(card, teacher.manifest.base, where=teacher.name)
    fix = "Fix: carryon train --store TEACHER"
    if not card.is_trained_on(teacher.fingerprint, teacher.samples_digest):
        raise InputError(
            f"teacher_carryon: expected one that was trained on {teacher.name}, got one of another "
            f"store. {fix}"
        )
    split = split_of(teacher, share=card.split["held_out_ratio"], seed=card.split["seed"])
    seen = np.setdiff1d(joined.samples[held_out], split.held_out)
    if len(seen):
        raise InputError(
            f"teacher_carryon: expected it to hold out the student's {len(held_out)} held-out "
            f"samples, got one that was trained on {len(seen)} of them, such as "
            f"{teacher.sample_id(int(seen[0]))!a:.80}. Fix: mark them as held out in --data of both"
        )
