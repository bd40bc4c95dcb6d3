"""Damages of the benchmarks of trust: each changes what it says, and each is noticed."""

import random
from pathlib import Path

import pytest

from carryon.tools.bench.trust.corruption import make_store_subject, make_subjects, run_trials
from carryon.tools.bench.trust.damage import FAULTS, Changes, kind_of, plan_damages, read_folder
from carryon.tools.bench.trust.table import Things

_FOLDER = {
    "step-1/w.bin": bytes(range(200)),
    "step-2/w.bin": bytes(range(1, 201)),
    "run.json": b'{"alpha": 0.15, "epochs": 2, "id": "a9"}',
    "lines.jsonl": b'{"step": 1}\n{"step": 2}\n{"step": 3}\n',
}
_VERSIONS = [{name: content[::-1] for name, content in _FOLDER.items()}]


def damaged(fault: str, name: str = "step-1/w.bin") -> Changes:
    changes = FAULTS[fault](name, _FOLDER, _VERSIONS, random.Random(0))
    assert changes is not None
    return changes


def content_after(fault: str, name: str = "step-1/w.bin") -> bytes:
    changes = damaged(fault, name)
    assert list(changes) == [name]
    content = changes[name]
    assert content is not None
    return content


def test_a_bit_is_flipped() -> None:
    before, after = _FOLDER["step-1/w.bin"], content_after("flip_bit")
    flipped = [a ^ b for a, b in zip(before, after, strict=True) if a != b]
    assert len(flipped) == 1
    assert flipped[0].bit_count() == 1


def test_a_block_of_zeros_is_written() -> None:
    before, after = _FOLDER["step-1/w.bin"], content_after("zero_block")
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert len(after) == len(before)
    assert 0 < len(changed) <= 64
    assert not any(after[changed[0] : changed[-1] + 1])


def test_the_end_is_cut_off() -> None:
    after = content_after("cut_end")
    assert len(after) < 200
    assert _FOLDER["step-1/w.bin"].startswith(after)


def test_bytes_are_appended() -> None:
    after = content_after("append_bytes")
    assert len(after) > 200
    assert after.startswith(_FOLDER["step-1/w.bin"])


def test_a_file_is_removed_replaced_or_swapped() -> None:
    first, second = _FOLDER["step-1/w.bin"], _FOLDER["step-2/w.bin"]
    assert damaged("remove") == {"step-1/w.bin": None}
    assert damaged("replace_by_namesake") == {"step-1/w.bin": second}
    assert damaged("replace_by_version") == {"step-1/w.bin": first[::-1]}
    assert damaged("swap") == {"step-1/w.bin": second, "step-2/w.bin": first}


def test_a_number_of_a_document_is_edited_and_no_text() -> None:
    after = content_after("edit_number", "run.json")
    assert after in (
        b'{"alpha": 0.16, "epochs": 2, "id": "a9"}',
        b'{"alpha": 0.15, "epochs": 3, "id": "a9"}',
    )


def test_a_line_is_dropped_or_written_twice() -> None:
    before = _FOLDER["lines.jsonl"].splitlines()
    fewer = content_after("drop_line", "lines.jsonl").splitlines()
    more = content_after("duplicate_line", "lines.jsonl").splitlines()
    assert (len(fewer), len(more)) == (2, 4)
    assert [line for line in before if line in fewer] == fewer
    assert sorted(set(more)) == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_does_not_apply_changes_nothing(fault: str) -> None:
    alone = {"a.png": b"picture"}
    changes = FAULTS[fault]("a.png", alone, [{"a.png": b"other"}], random.Random(0))
    applies = {"flip_bit", "zero_block", "cut_end", "append_bytes", "remove"}
    assert (changes is not None) == (fault in applies)


def test_every_kind_of_file_gets_every_fault_in_turn_and_each_changes_something() -> None:
    damages = plan_damages(_FOLDER, _VERSIONS, trials=60, seed=0)
    assert damages == plan_damages(_FOLDER, _VERSIONS, trials=60, seed=0)
    kinds = [kind_of(damage.file) for damage in damages]
    assert {kinds.count(kind) for kind in kinds} == {20}
    assert {damage.fault for damage in damages} == set(FAULTS)
    assert all(
        content != _FOLDER[name] for each in damages for name, content in each.changes.items()
    )


def test_a_damage_changes_the_folder_as_planned_and_locks_are_left_out(tmp_path: Path) -> None:
    for name, content in {**_FOLDER, ".lock": b"1"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read_folder(tmp_path) == _FOLDER
    for damage in plan_damages(_FOLDER, _VERSIONS, trials=1, seed=3):
        damage.apply(tmp_path)
        expected = {
            name: content
            for name, content in {**_FOLDER, **damage.changes}.items()
            if content is not None
        }
        assert read_folder(tmp_path) == expected


def test_damages_to_things_of_every_kind_are_noticed_and_give_no_other_numbers(
    things: Things, tmp_path: Path
) -> None:
    made = [*make_subjects(things, tmp_path), make_store_subject(things)]
    for outcome in run_trials(made, tmp_path / "trials", trials=12):
        assert outcome.is_noticed, outcome
        assert not outcome.is_wrong, outcome
        assert not outcome.has_traceback, outcome
