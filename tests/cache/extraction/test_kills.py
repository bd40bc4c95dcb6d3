"""Kills at any instant: the same call again ends with the result of an undisturbed call."""

import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.tiny_stores import (
    error_of,
    extract_tiny,
    files_below,
    readable_content,
    receipts_in,
    start_extraction,
    states_at_kills,
)

from carryon.cache.base.model import Base
from carryon.cache.errors import KnownDataError
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify

ALL_INSTANTS = 50  # from this many --kill-rounds on, every change to the disk is an instant
SOME_INSTANTS = 8


@pytest.mark.slow
def test_extraction_killed_at_random_instants_resumes_to_the_same_store(
    tiny_base_folder: Path,
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    request: pytest.FixtureRequest,
) -> None:
    rounds = request.config.getoption("--kill-rounds")
    expected = readable_content(store_original)
    longest_s = seconds_of_one(tiny_base_folder, store_data, store_tmp / "timed")
    picks = random.Random(rounds)
    num_landed = 0
    while num_landed < rounds:
        root = store_tmp / str(num_landed)
        extraction = start_extraction(tiny_base_folder, store_data, root)
        delay_s = picks.uniform(0.0, longest_s)
        if extraction.talk.poll(delay_s):
            longest_s = delay_s  # it ended before the kill: one more try
        else:
            num_landed += 1
        extraction.kill()
        before = receipts_in(root)
        extract_tiny(tiny_base, store_data, root)
        after = receipts_in(root)
        assert {name: after[name] for name in before} == before, "a unit was computed twice"
        assert readable_content(root) == expected
        assert leftovers(root) == []
        shutil.rmtree(root)
    print(f"{num_landed} of {rounds} kills while the extraction ran were survived")


def seconds_of_one(base_folder: Path, data: Path, root: Path) -> float:
    extraction = start_extraction(base_folder, data, root)
    started_at = time.perf_counter()
    extraction.wait_for("done")
    elapsed_s = time.perf_counter() - started_at
    extraction.kill()
    return elapsed_s


@pytest.mark.slow
def test_extraction_killed_before_any_change_to_the_disk_resumes_to_the_same_store(
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    request: pytest.FixtureRequest,
) -> None:
    expected = readable_content(store_original)
    copies = copies_at_kills(
        store_tmp, request, None, lambda root: extract_tiny(tiny_base, store_data, root)
    )
    for root in copies:
        before = receipts_in(root)
        is_refused_or_readable(root)
        extract_tiny(tiny_base, store_data, root)
        after = receipts_in(root)
        assert {name: after[name] for name in before} == before, f"{root.name}: computed twice"
        assert readable_content(root) == expected, root.name
        assert leftovers(root) == []
        assert verify(root, depth="full").is_complete, root.name


def is_refused_or_readable(root: Path) -> None:
    """A reader sees no store, or an unfinished one whose finished units are right."""
    error = error_of(lambda: Store.open(root))
    is_between = "its copy is there" in error  # killed between the manifest and its copy
    is_expected = error.startswith(("MissingError", "UnfinishedStoreError"))
    assert not error or is_between or is_expected, error
    if not error:
        store = Store.open(root)
        assert store.finished_units == set(range(store.num_units))


@pytest.mark.slow
def test_append_killed_before_any_change_keeps_old_samples_and_resumes_to_the_same_store(
    tiny_base: Base,
    store_data: Path,
    store_more_data: Path,
    store_original: Path,
    store_tmp: Path,
    request: pytest.FixtureRequest,
) -> None:
    whole = store_tmp / "whole"
    shutil.copytree(store_original, whole)
    extract_tiny(tiny_base, store_more_data, whole, append=True)
    expected, old = readable_content(whole), readable_content(store_original)
    old_receipts = receipts_in(store_original)

    copies = copies_at_kills(
        store_tmp,
        request,
        store_original,
        lambda root: extract_tiny(tiny_base, store_more_data, root, append=True),
    )
    for root in copies:
        assert old_part(root) == old_part(store_original), root.name
        assert verify(root, depth="full").is_sound, verify(root, depth="full").problems
        before = receipts_in(root)
        with suppress(KnownDataError):  # killed behind the last receipt
            extract_tiny(tiny_base, store_more_data, root, append=True)
        after = receipts_in(root)
        assert {name: after[name] for name in before} == before, f"{root.name}: computed twice"
        assert {name: after[name][0] for name in old_receipts} == {
            name: content for name, (content, _) in old_receipts.items()
        }
        assert readable_content(root) == expected, root.name
        assert leftovers(root) == []
        assert verify(root, depth="full").is_complete, root.name
    assert old["ids"] == expected["ids"][: len(old["ids"])]


def old_part(root: Path) -> list[object]:
    """Return the content that a reader gets of the samples before the append."""
    store = Store.open(root, allow_unfinished=True)
    units = range(store.manifest.parts[0].num_units)
    content: list[object] = []
    for unit in (store.read_unit(unit) for unit in units):
        content += [unit.samples, unit.starts.tolist(), unit.tokens.tobytes()]
        content += [values.tobytes() for values in unit.hidden.values()]
        content += [store.sample_id(sample) for sample in unit.samples]
    return content


def copies_at_kills(
    folder: Path,
    request: pytest.FixtureRequest,
    first: Path | None,
    run: Callable[[Path], object],
) -> list[Path]:
    """Return copies of a store as kills leave it, at every change or at some of them.

    Args:
        folder: where they are made.
        request: has the option for their number.
        first: the store that the run resumes; None: it makes a new one.
        run: the call that is killed.
    """
    count = 0

    def count_one(number: int) -> bool:
        nonlocal count
        count = number + 1
        return False

    roots = folder / "counted", folder / "run"
    if first is not None:
        for root in roots:
            shutil.copytree(first, root)
    states_at_kills(roots[0], lambda: run(roots[0]), at=count_one, into=folder)
    is_full = request.config.getoption("--kill-rounds") >= ALL_INSTANTS
    chosen = set(range(count) if is_full else range(count // 16, count, count // SOME_INSTANTS))
    into = folder / "killed"
    into.mkdir()
    copies = states_at_kills(roots[1], lambda: run(roots[1]), at=chosen.__contains__, into=into)
    assert len(copies) >= len(chosen) - 2  # a folder that does not exist yet has no copy
    print(f"killed before {len(copies)} of {count} changes to the disk")
    return copies


def leftovers(root: Path) -> list[str]:
    return [path for path in files_below(root) if ".partial" in path]
