"""The table of commands that the benchmarks of trust kill, starve and damage."""

from pathlib import Path

import pytest

from carryon.tools.bench.trust.calls import Limits, call
from carryon.tools.bench.trust.table import COMMANDS, Things, bits_of


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
