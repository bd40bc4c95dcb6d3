"""The table of commands that the benchmarks of trust kill, starve and damage."""

from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench.trust.calls import Limits, call
from carryon.tools.bench.trust.full_disks import fill
from carryon.tools.bench.trust.shared_kills import kill_one
from carryon.tools.bench.trust.table import COMMANDS, Things, bits_of, what_is_wrong
from carryon.tools.bench.trust.writers import FOLDERS, first_change_under_lock, start_both


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_in_another_folder_leaves_the_same_bits(
    name: str, things: Things, tmp_path: Path
) -> None:
    command = things.start(name, tmp_path / "trial")
    ended = call(command.words, cwd=tmp_path / "trial")

    assert (ended.code, ended.has_traceback) == (0, False)
    assert bits_of(tmp_path / "trial" / command.out) == things.results[name]
    again = call(command.words, cwd=tmp_path / "trial")
    assert again.code in command.codes
    assert not again.has_traceback


def test_a_kill_comes_before_the_change_of_its_number(things: Things, tmp_path: Path) -> None:
    command = things.start("train", tmp_path / "trial")
    ended = call(command.words, cwd=tmp_path / "trial", limits=Limits(kill_at=1))

    assert ended.was_killed
    assert not (tmp_path / "trial/run").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_with_the_same_bits(
    name: str, things: Things, tmp_path: Path
) -> None:
    command = things.start(name, tmp_path / "trial")
    middle = len(things.ended[name].changes) // 2
    killed = call(command.words, cwd=tmp_path / "trial", limits=Limits(kill_at=middle))
    assert killed.was_killed

    again = call(command.words, cwd=tmp_path / "trial")

    assert what_is_wrong(things, name, tmp_path / "trial", again) == {}


@pytest.mark.parametrize("is_again", [False, True])
def test_of_processes_that_share_a_store_one_is_killed(
    things: Things, tmp_path: Path, is_again: bool
) -> None:
    limits = Limits(kill_at=20)  # in the plan, or in a unit of the first that the other has planned
    for number in range(10):
        trial = tmp_path / f"{number}/trial"
        trial.parent.mkdir()
        was_killed, wrong = kill_one(things, trial, limits, is_again=is_again)
        assert wrong == {}
        if was_killed:  # else the other has written it all before
            return
    pytest.fail("the first process always ended before its 20th change")


def test_a_merge_killed_behind_its_last_step_is_there_and_leaves_no_lock(
    things: Things, tmp_path: Path
) -> None:
    trial = tmp_path / "trial"
    command = things.start("merge", trial)
    last = len(things.ended["merge"].changes)
    assert call(command.words, cwd=trial, limits=Limits(kill_at=last)).was_killed

    assert what_is_wrong(things, "merge", trial, call(command.words, cwd=trial)) == {}


def test_what_differs_from_an_undisturbed_command_is_noticed(
    things: Things, tmp_path: Path
) -> None:
    trial = tmp_path / "trial"
    ended = call(things.start("train", trial).words, cwd=trial)
    assert what_is_wrong(things, "train", trial, ended) == {}
    weights = trial / "run/carryon/carryon.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (trial / "run/.left.partial").touch()

    wrong = what_is_wrong(things, "train", trial, ended)

    assert wrong["bits"] == [".left.partial", "carryon/carryon.safetensors"]
    assert wrong["leftovers"] == ["run/.left.partial"]
    assert "carryon.safetensors" in wrong["verify"]


@pytest.mark.parametrize(("kind", "name"), FOLDERS.items())
def test_of_two_writers_one_works_and_one_is_refused(
    kind: str, name: str, things: Things, tmp_path: Path
) -> None:
    changes = things.ended[name].changes
    pause_at = (first_change_under_lock(changes) + len(changes)) // 2
    assert start_both(things, name, tmp_path / "trial", pause_at=pause_at) == {}, kind


def test_a_command_on_a_full_disk_says_so_and_ends_with_the_same_bits_later(
    things: Things, tmp_path: Path
) -> None:
    try:
        wrong = fill(things, "update", tmp_path, pages=20, limits=Limits())
    except InputError as error:
        pytest.skip(str(error))
    assert wrong == {}


def test_a_hanging_command_is_told_from_one_that_ends(things: Things, tmp_path: Path) -> None:
    command = things.start("merge", tmp_path / "trial")
    limits = Limits(pause_at=1, seconds=3.0)
    assert call(command.words, cwd=tmp_path / "trial", limits=limits).is_hung
