"""Several processes on one store: the content of one process, whoever is killed or paused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_stores import (
    FORWARD,
    SHARING,
    UNIT_TOKENS,
    Extraction,
    error_of,
    extract_tiny,
    files_below,
    readable_content,
    start_extraction,
    watch_changes,
    write_corpus,
)

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, SettingMismatchError, StoreBusyError
from carryon.cache.extraction.repair import repair
from carryon.cache.extraction.sharing.claims import Claims, clear_leftovers
from carryon.cache.extraction.sharing.commits import commits_in, finish_commit
from carryon.cache.extraction.sharing.leases import Leases, LeaseTimes
from carryon.cache.extraction.sharing.worker import run_worker
from carryon.cache.extraction.sharing.workers import Sharing, plan_sharing
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import receipt_path, shard_path
from carryon.cache.lock import LOCK_PATH
from carryon.cache.settings import CorpusSettings, ForwardSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.cache.store.verify import verify

PROGRAM = [sys.executable, "-c", "import sys; from carryon.tools.cli.main import main; "]
PROGRAM[-1] += "sys.exit(main())"


PATIENCE_S = 300.0
"""For a slow machine; on none is it waited for."""


def start(
    base_folder: Path,
    data: Path,
    root: Path,
    *,
    held_at: str = "",
    sharing: Sharing = SHARING,
) -> Extraction:
    return start_extraction(base_folder, data, root, held_at=held_at, sharing=sharing)


def assert_same_as_alone(root: Path, original: Path) -> None:
    """Check that a store is complete, has the content of another, and nothing else."""
    assert readable_content(root) == readable_content(original)
    assert verify(root, depth="full").is_complete
    assert set(files_below(root)) == set(files_below(original)), "leftovers"


def without_times(content: dict[str, bytes]) -> dict[str, object]:
    """Return the files of a store; of receipts what does not depend on the speed."""
    return {
        path: {k: v for k, v in json.loads(each).items() if k not in ("elapsed_s", "sha256")}
        if path.startswith("units/") and path[len("units/") :].split(".")[0].isdecimal()
        else each
        for path, each in content.items()
    }


def test_one_of_several_processes_writes_the_files_of_a_process_alone(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    report = extract_tiny(tiny_base, store_data, store_tmp / "store", sharing=SHARING)
    assert report.is_finished
    assert report.computed_units == report.num_units
    shared, alone = files_below(store_tmp / "store"), files_below(store_original)
    assert without_times(shared) == without_times(alone)
    again = extract_tiny(tiny_base, store_data, store_tmp / "store", sharing=SHARING)
    assert again.computed_units == 0
    assert files_below(store_tmp / "store") == shared


@pytest.mark.slow
def test_processes_that_start_at_the_same_time_share_the_units(
    tiny_base_folder: Path, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    sharing = replace(SHARING, times=LeaseTimes(heartbeat_s=0.1, expiry_s=PATIENCE_S))
    first = start(tiny_base_folder, store_data, root, held_at=receipt_path(0), sharing=sharing)
    first.wait_for("held")  # it has the leases of units 0 and 1: one is written, one computed
    others = [start(tiny_base_folder, store_data, root, sharing=sharing) for _ in range(2)]
    wanted = {f"{unit}.json" for unit in range(2, read_manifest(root).num_units)}
    assert wanted
    deadline = time.monotonic() + PATIENCE_S
    while not wanted <= {path.name for path in (root / "units").glob("*.json")}:
        assert time.monotonic() < deadline, "others do not go on while one unit is at work"
        time.sleep(0.02)
    assert not (root / receipt_path(0)).exists(), "a unit whose owner lives is waited for"
    first.talk.send("go on")
    for each in (first, *others):
        each.wait_for("done")
        each.kill()
    assert_same_as_alone(root, store_original)


@pytest.mark.slow
def test_processes_killed_at_random_moments_leave_a_store_that_the_rest_completes(
    tiny_base_folder: Path,
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    request: pytest.FixtureRequest,
) -> None:
    rounds = max(3, request.config.getoption("--kill-rounds"))
    picks = random.Random(rounds)
    num_killed = 0
    for number in range(rounds):
        root = store_tmp / str(number)
        pair = [start(tiny_base_folder, store_data, root) for _ in range(2)]
        time.sleep(picks.uniform(0.0, 0.4))
        num_killed += not pair[0].talk.poll()
        pair[0].kill()
        if number % 3 == 2:  # both; the same command is run again
            pair[1].kill()
            extract_tiny(tiny_base, store_data, root, sharing=SHARING)
        else:
            pair[1].wait_for("done")
            pair[1].kill()
        assert_same_as_alone(root, store_original)
        shutil.rmtree(root)
    print(f"{num_killed} of {rounds} kills came before the end")


@pytest.mark.slow
@pytest.mark.parametrize(
    "held_at",
    [
        "units/.1.0.lease",
        shard_path("final", 1),
        "units/..1.commit.",
        "units/.1.commit",
        receipt_path(1),
        "samples/id/zarr.json",
        "zarr.json",
    ],
)
def test_whatever_step_a_process_is_killed_at_another_takes_over(
    tiny_base_folder: Path,
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    held_at: str,
) -> None:
    root = store_tmp / "store"
    first = start(tiny_base_folder, store_data, root, held_at=held_at)
    first.wait_for("held")
    first.kill()
    extract_tiny(tiny_base, store_data, root, sharing=SHARING)
    assert_same_as_alone(root, store_original)


@pytest.mark.slow
@pytest.mark.parametrize("held_at", ["units/.1.commit", shard_path("layer.1", 1), receipt_path(1)])
def test_a_process_that_was_paused_for_long_yields(
    tiny_base_folder: Path,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    held_at: str,
) -> None:
    root = store_tmp / "store"
    first = start(tiny_base_folder, store_data, root, held_at=held_at)
    first.wait_for("held")
    os.kill(first.process.pid, signal.SIGSTOP)  # its lease is no longer touched
    other = start(tiny_base_folder, store_data, root)
    other.wait_for("done")
    before = files_below(root)
    os.kill(first.process.pid, signal.SIGCONT)
    first.talk.send("go on")
    first.wait_for("done")
    for each in (first, other):
        each.kill()
    assert files_below(root) == before
    assert_same_as_alone(root, store_original)


def test_two_writers_of_other_bytes_never_mix(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    """The second would write other states, as on other hardware: it yields at every step."""
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    manifest = read_manifest(root)
    unit_input = UnitInputs(root, manifest).read(1)
    expected = files_below(root)
    (root / receipt_path(1)).unlink()
    states: dict[str, Any] = {}
    for tap in manifest.taps:
        states[tap] = np.zeros((UNIT_TOKENS, manifest.width), np.float32)
        states[tap][: unit_input.num_tokens] = 1.0
    with Leases(root) as one, Leases(root) as other:
        late, first = Claims(root, manifest, one), Claims(root, manifest, other)
        assert one.take("1")
        assert list(first.iter_units([0])) == []
        (root / receipt_path(1)).write_bytes(expected[receipt_path(1)])
        assert late.write_unit(unit_input, states, elapsed_s=0.0) is None
    assert files_below(root) == expected


def test_a_late_writer_leaves_nothing_where_others_finish_and_clear_its_unit(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    manifest, expected = read_manifest(root), files_below(root)
    unit_input = UnitInputs(root, manifest).read(1)
    (root / receipt_path(1)).unlink()
    states = {tap: np.zeros((UNIT_TOKENS, manifest.width), np.float32) for tap in manifest.taps}
    is_cleared = False

    def finish(number: int, path: Path) -> None:
        """Before the second tap's file aside has its name: be the others."""
        nonlocal is_cleared
        folder = (root / shard_path("layer.1", 1)).parent
        if path.parent == folder and path.name.startswith(".0.") and not is_cleared:
            is_cleared = True
            [partial] = folder.glob("..0.*")
            partial.unlink()
            (root / receipt_path(1)).write_bytes(expected[receipt_path(1)])

    with Leases(root) as leases:
        claims = Claims(root, manifest, leases)
        assert leases.take("1")
        with watch_changes(root, finish):
            assert claims.write_unit(unit_input, states, elapsed_s=0.0) is None
    assert is_cleared
    assert files_below(root) == expected


def test_a_commit_that_two_finish_at_the_same_time_is_finished_for_both(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    """One clears the other's receipt that has not its name yet."""
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    expected = files_below(root)
    (root / receipt_path(1)).unlink()
    (root / "units/.1.commit").write_bytes(b"0" * 16 + b"\n" + expected[receipt_path(1)])
    is_cleared = False

    def finish(number: int, path: Path) -> None:
        nonlocal is_cleared
        partials = list((root / "units").glob(".1.json.*.partial"))
        if path == root / receipt_path(1) and partials and not is_cleared:
            is_cleared = True
            partials[0].unlink()
            (root / "units/.1.commit").unlink()
            (root / receipt_path(1)).write_bytes(expected[receipt_path(1)])

    with watch_changes(root, finish):
        assert finish_commit(root, read_manifest(root), 1)
    assert is_cleared
    assert files_below(root) == expected


def test_a_commit_whose_files_are_gone_is_removed_and_the_unit_computed_again(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    receipt = (root / receipt_path(1)).read_bytes()
    (root / receipt_path(1)).unlink()
    (root / shard_path("final", 1)).write_bytes(b"other")
    for content in (b"0" * 16 + b"\n" + receipt, b"", b"no token\n" + receipt, b"0" * 16 + b"\n{"):
        (root / "units/.1.commit").write_bytes(content)
        assert commits_in(root) == {1}
        assert not finish_commit(root, read_manifest(root), 1)
        assert commits_in(root) == set()
    extract_tiny(tiny_base, store_data, root, sharing=SHARING)
    assert_same_as_alone(root, store_original)


def test_a_process_alone_is_refused_beside_others_and_others_beside_it(
    tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    from carryon.cache.lock import write_lock

    root = store_tmp / "store"
    extract_tiny(tiny_base, store_data, root)
    with write_lock(root, is_shared=True):
        busy = f"process {os.getpid()} is writing to this store"
        for call in (
            lambda: extract_tiny(tiny_base, store_data, root),
            lambda: repair(root, base=tiny_base),
        ):
            with pytest.raises(StoreBusyError, match=busy):
                call()
        assert extract_tiny(tiny_base, store_data, root, sharing=SHARING).is_finished
    with write_lock(root), pytest.raises(StoreBusyError, match=busy):
        extract_tiny(tiny_base, store_data, root, sharing=SHARING)
    assert (root / LOCK_PATH).read_text() == ""


def test_another_corpus_or_setting_is_refused_by_name(
    tiny_base: Base, store_data: Path, store_more_data: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    extract_tiny(tiny_base, store_data, root, sharing=SHARING)
    before = files_below(root)
    with pytest.raises(SettingMismatchError, match="data: expected those of the store"):
        extract_tiny(tiny_base, store_more_data, root, sharing=SHARING)
    with pytest.raises(SettingMismatchError, match="max_tokens: expected 64"):
        extract_tiny(
            tiny_base, store_data, root, sharing=SHARING, corpus=CorpusSettings(max_tokens=32)
        )
    assert files_below(root) == before


def test_what_a_killed_planner_has_left_is_cleared_but_not_beside_later_units(
    tiny_base: Base,
    store_data: Path,
    store_more_data: Path,
    store_original: Path,
    store_tmp: Path,
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    before = read_manifest(root)
    extract_tiny(tiny_base, store_more_data, root, append=True)
    manifest, expected = read_manifest(root), files_below(root)
    partial = (root / shard_path("final", manifest.num_units - 1)).with_name(".0.of-others.partial")
    partial.write_text("at work")
    (root / "units/.plan.0.lease").write_text("left")
    with Leases(root, LeaseTimes(expiry_s=0.0)) as leases:
        clear_leftovers(root, before, leases)
        assert partial.exists()
        clear_leftovers(root, manifest, leases)
    assert files_below(root) == expected


def test_processes_append_together(
    tiny_base: Base,
    store_data: Path,
    store_more_data: Path,
    store_original: Path,
    store_tmp: Path,
) -> None:
    alone, shared = (
        Path(shutil.copytree(store_original, store_tmp / name)) for name in ("alone", "shared")
    )
    extract_tiny(tiny_base, store_more_data, alone, append=True)
    for _ in range(2):  # the second comes late: all is done
        extract_tiny(tiny_base, store_more_data, shared, append=True, sharing=SHARING)
    assert_same_as_alone(shared, alone)


def test_a_disk_limit_stops_between_units_and_a_higher_one_resumes(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    limit = sum(map(len, files_below(store_original).values())) - 2000
    report = extract_tiny(tiny_base, store_data, root, sharing=SHARING, max_disk_bytes=limit)
    assert not report.is_finished
    assert sum(map(len, files_below(root).values())) <= limit
    assert extract_tiny(tiny_base, store_data, root, sharing=SHARING).is_finished
    assert_same_as_alone(root, store_original)


def test_a_process_alone_resumes_what_others_have_left(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    (root / receipt_path(1)).unlink()
    for name in (".1.0.lease", ".plan.0.lease", ".1.commit", "..1.commit.0.partial"):
        (root / "units" / name).write_text("left")
    extract_tiny(tiny_base, store_data, root)
    assert_same_as_alone(root, store_original)


@pytest.mark.parametrize("name", [".1.0.lease", ".1.commit"])
@pytest.mark.parametrize("sharing", [None, SHARING])
def test_a_folder_in_place_of_a_claim_is_named(
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    name: str,
    sharing: Sharing | None,
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    (root / receipt_path(1)).unlink()
    (root / "units" / name).mkdir()
    text = error_of(lambda: extract_tiny(tiny_base, store_data, root, sharing=sharing))
    assert f"{name}: expected a file, got a folder" in text
    assert (root / "units" / name).is_dir()


def test_a_folder_among_what_killed_writers_have_left_is_named(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    (root / "units/.1.0.lease").write_text("left")
    (root / "units/.1.json.1.partial").mkdir()
    text = error_of(lambda: extract_tiny(tiny_base, store_data, root, sharing=SHARING))
    assert ".1.json.1.partial: expected a file, got a folder" in text


def job_of(root: Path, base: Base, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "number": 1,
        "root": str(root),
        "fingerprint": read_manifest(root).fingerprint,
        "base": base.source,
        "forward": FORWARD.to_dict(),
        "max_disk_bytes": None,
        "num_threads": 1,
        "times": [0.1, 2.0],
    } | changes


def test_a_worker_needs_the_store_and_the_base_alone(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    for unit in (0, 2):
        (root / receipt_path(unit)).unlink()
        (root / shard_path("final", unit)).unlink()
    with pytest.raises(SettingMismatchError, match="expected the plan 0000.*Fix: run the same"):
        run_worker(job_of(root, tiny_base, fingerprint="0" * 64))
    other = FORWARD.to_dict() | {"compute_dtype": "bfloat16"}
    with pytest.raises(SettingMismatchError, match="compute_dtype: expected float32"):
        run_worker(job_of(root, tiny_base, forward=other))
    assert not (root / receipt_path(0)).exists()
    run_worker(job_of(root, tiny_base))
    assert_same_as_alone(root, store_original)


LOSING = """
import sys, time

class Losing:
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.stderr.write("here" + chr(10))
        try:
            time.sleep({patience})
        except KeyboardInterrupt:
            raise ImportError("as a library's C code makes of it") from None

sys.meta_path.insert(0, Losing())
"""


def test_a_worker_that_is_told_to_stop_while_it_imports_is_silent(store_tmp: Path) -> None:
    (store_tmp / "sitecustomize.py").write_text(
        LOSING.format(module="numpy", patience=PATIENCE_S), encoding="utf-8"
    )
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "carryon.cache.extraction.sharing.worker"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(store_tmp), *sys.path])},
    )
    assert worker.stdin is not None
    assert worker.stderr is not None
    job = {"root": str(store_tmp / "store"), "number": 1}
    worker.stdin.write(json.dumps(job) + "\n")
    worker.stdin.flush()
    assert worker.stderr.readline() == "here\n"
    _, errors = worker.communicate(timeout=PATIENCE_S)  # closes its input
    assert errors == ""
    assert worker.returncode == -signal.SIGINT


def test_workers_are_refused_where_torchrun_starts_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    sharing, forward = plan_sharing(0, FORWARD)
    assert sharing is not None
    assert (sharing.workers, forward) == (1, FORWARD)
    with pytest.raises(InputError, match="workers: .*torchrun.*Fix: leave out --workers"):
        plan_sharing(2, FORWARD)
    assert "Fix: --workers 2" in error_of(lambda: plan_sharing(-1, FORWARD))


def test_workers_that_die_before_they_are_told_their_job_are_warned_of(
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start_process = subprocess.Popen

    def start_and_die(words: list[str], **how: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        process = start_process([sys.executable, "-c", "raise SystemExit(1)"], **how)
        process.wait()
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", start_and_die)
    extract_tiny(tiny_base, store_data, store_tmp / "store", sharing=replace(SHARING, workers=2))
    assert len(started) == 1
    assert_same_as_alone(store_tmp / "store", store_original)
    assert "worker 2 was ended by an error: others took over" in caplog.text


# Commands


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "long.jsonl", num_samples=600)


def words_of(base: Path, data: Path, root: Path) -> list[str]:
    words = ["extract", "--base", str(base), "--data", str(data), "--out", str(root)]
    words += ["--unit-tokens", str(UNIT_TOKENS), "--device", "cpu", "--compute-dtype", "float32"]
    return [*words, "--tokenizer-workers", "1"]


@pytest.fixture(scope="module")
def long_original(
    tiny_base_folder: Path, long_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("stores") / "alone"
    subprocess.run(
        [*PROGRAM, *words_of(tiny_base_folder, long_data, root)], check=True, capture_output=True
    )
    return root


@pytest.mark.slow
def test_a_command_with_two_workers_makes_the_store_of_one_process(
    tiny_base_folder: Path, long_data: Path, long_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    done = subprocess.run(
        [*PROGRAM, *words_of(tiny_base_folder, long_data, root), "--workers", "2"],
        check=True,
        capture_output=True,
        text=True,
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["computed_units"] == facts["num_units"]
    assert facts["is_finished"]
    assert "Traceback" not in done.stderr
    assert_same_as_alone(root, long_original)


@pytest.mark.slow
def test_ctrl_c_ends_all_workers_and_loses_nothing(
    tiny_base_folder: Path, long_data: Path, long_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    words = [*PROGRAM, *words_of(tiny_base_folder, long_data, root), "--workers", "2"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = children_at_first_receipt(process, root)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].endswith("Fix: run the same command to resume")
    assert "Traceback" not in errors
    assert children
    assert not any(map(is_alive, children))
    assert not list((root / "units").glob(".*.lease"))
    subprocess.run(words, check=True, capture_output=True)
    assert_same_as_alone(root, long_original)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(
    tiny_base_folder: Path, long_data: Path, long_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    words = [*PROGRAM, *words_of(tiny_base_folder, long_data, root), "--workers", "2"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = children_at_first_receipt(process, root)
    process.kill()
    process.wait()
    assert children
    deadline = time.monotonic() + PATIENCE_S
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(words, check=True, capture_output=True)
    assert_same_as_alone(root, long_original)


@pytest.mark.slow
def test_torchrun_with_two_processes_makes_the_store_of_one(
    tiny_base_folder: Path, long_data: Path, long_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    program = store_tmp / "carryon_main.py"
    program.write_text("import sys; from carryon.tools.cli.main import main; sys.exit(main())")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(program), *words_of(tiny_base_folder, long_data, root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert len(done.stdout.splitlines()) == 1, "only the first process prints"
    assert done.stderr.count("samples kept") <= 1
    assert_same_as_alone(root, long_original)


def children_at_first_receipt(process: subprocess.Popen[Any], root: Path) -> list[int]:
    """Wait until a unit has a receipt, and return the numbers of the process's children."""
    while not list((root / "units").glob("[0-9]*.json")) and process.poll() is None:
        time.sleep(0.005)
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_base_that_is_spread_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ForwardSettings(device_map="auto")
    assert plan_sharing(1, forward)[1] == forward
    with pytest.raises(InputError, match="device_map: expected one process.*--workers"):
        plan_sharing(2, forward)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device_map: expected one process.*torchrun"):
        plan_sharing(0, forward)
