"""Extraction by actors of a real Ray: the content of one process, whoever is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.ray_jobs import open_sleeper
from support.tiny_stores import UNIT_TOKENS, error_of, files_below, readable_content, write_corpus

from carryon.cache.errors import InputError
from carryon.cache.extraction.ray_actors.cluster import connected
from carryon.cache.extraction.ray_actors.dispatch import Actors
from carryon.cache.extraction.ray_actors.slots import Slot
from carryon.cache.extraction.sharing.workers import check_backend, plan_sharing
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.format.zarr_metadata import receipt_path, row_path, shard_path
from carryon.cache.settings import ForwardSettings, RaySettings
from carryon.cache.store.verify import verify

pytest.importorskip("ray", reason="the extra ray is not installed")
PROGRAM = [sys.executable, "-c", "import sys; from carryon.tools.cli.main import main; "]
PROGRAM[-1] += "sys.exit(main())"
PATIENCE_S = 580.0
NODE = {"object_store_memory": 80 << 20}
RAYS_OWN = re.compile(r"raylet|usage stats|dashboard|worker\.py|ray\.init|\(pid=|session_|\x1b")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray with a node of two CPUs."""
    from ray.cluster_utils import Cluster

    node = NODE | {"num_cpus": 2, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # as if installed
        started = Cluster(initialize_head=True, head_node_args=node)
        yield started
        started.shutdown()


@pytest.fixture
def connected_ray(cluster: Any) -> Iterator[ModuleType]:  # noqa: ANN401 -- untyped
    """The module, connected to it."""
    with connected(cluster.address, num_cpus=1) as ray:
        yield ray


# Who does what, with units that sleep


def actors_of(
    ray: ModuleType,
    folder: Path,
    dead: list[str],
    *,
    workers: int = 2,
    **job: Any,  # noqa: ANN401
) -> Actors:
    return Actors(
        ray,
        {"base": "none", "folder": str(folder), "sleep_s": 0.01} | job,
        slot=Slot(cpus=1, gpus=0),
        workers=workers,
        open_job=open_sleeper,
        on_death=dead.append,
    )


@pytest.mark.slow
def test_every_unit_is_computed_once_and_each_actor_has_a_line(
    connected_ray: ModuleType, tmp_path: Path
) -> None:
    notes: list[str] = []
    dead: list[str] = []
    actors = actors_of(connected_ray, tmp_path, dead, together=2, sleep_s=0.05)
    ledger = actors.compute(range(60), notes.append)
    assert (ledger.failed, ledger.stopped) == ({}, None)
    lines = [re.sub(r"[\d,]+ tokens/s", "N tokens/s", line) for line in actors.report()]
    counts = [int(line.partition(": ")[2].split()[0]) for line in lines]
    assert sum(counts) == 60
    assert min(counts) > 0
    host = os.uname().nodename
    assert lines == [
        f"actor {number} on {host}: {count} units, {10 * count} tokens, N tokens/s"
        for number, count in enumerate(counts, start=1)
    ]
    assert re.fullmatch(r"2 of 2 actors, [\d,]+( to [\d,]+)? tokens/s each", notes[-1])
    assert len(set(dead)) == 2, "their leases are removed at the end"


@pytest.mark.slow
def test_a_unit_that_kills_its_process_is_given_up_and_the_others_are_computed(
    connected_ray: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead: list[str] = []
    actors = actors_of(connected_ray, tmp_path, dead, deadly=[5], broken=[7])
    ledger = actors.compute(range(12), lambda _: None)
    assert list(ledger.failed) == [5]
    assert ledger.failed[5].startswith("tried 4 times: its worker process has died")
    computed = [int(line.partition(": ")[2].split()[0]) for line in actors.report()]
    assert sum(computed) >= 11
    warnings = [record.getMessage() for record in caplog.records if "has ended" in record.msg]
    assert any("CUDA error" in text for text in warnings), "a broken process is replaced"
    assert all("\n" not in text for text in warnings)


@pytest.mark.slow
def test_an_actor_that_cannot_load_the_base_says_why_in_one_line(
    connected_ray: ModuleType, tmp_path: Path
) -> None:
    dead: list[str] = []
    actors = actors_of(connected_ray, tmp_path, dead)
    actors._job.pop("base")
    with pytest.raises(InputError, match="base: expected a folder, got nothing. Fix: another"):
        actors.compute(range(3), lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "fatal_starts"), [(5, 4), (1, 100)])
def test_actors_that_die_as_they_start_end_the_job_if_none_is_left(
    connected_ray: ModuleType, tmp_path: Path, workers: int, fatal_starts: int
) -> None:
    dead: list[str] = []
    actors = actors_of(connected_ray, tmp_path, dead, workers=workers, fatal_starts=fatal_starts)
    if fatal_starts > workers:
        with pytest.raises(InputError, match="expected actors that load the base, got 3 that died"):
            actors.compute(range(3), lambda _: None)
    else:
        assert not actors.compute(range(3), lambda _: None).failed
    assert len(list(tmp_path.glob("start-*"))) == min(fatal_starts, 4 if workers > 1 else 3)


@pytest.mark.slow
def test_a_node_that_joins_late_takes_part_and_an_interrupt_ends_all_actors(
    connected_ray: ModuleType,
    cluster: Any,  # noqa: ANN401 -- untyped
    tmp_path: Path,
) -> None:
    dead: list[str] = []
    actors = actors_of(connected_ray, tmp_path, dead, workers=0, sleep_s=0.1)
    late: list[Any] = []

    def watch(note: str) -> None:
        if note.startswith("2 of 2 actors") and not late:
            late.append(cluster.add_node(num_cpus=1, **NODE))
        if note.startswith("3 of 3 actors"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actors.compute(range(100_000), watch)
    assert len(dead) == 3
    wait_for_the_end_of(set(map(int, dead)))
    cluster.remove_node(late[0])


def test_what_cannot_be_connected_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://other:10001")
    assert "got ray://other:10001" in error_of(lambda: connected("", num_cpus=1).__enter__())
    text = error_of(lambda: connected("ray://head:10001", num_cpus=1).__enter__())
    assert "ray_address: expected HOST:PORT" in text
    assert "Fix: ray job submit --address ray://head:10001" in text
    assert "got 'spark'. Fix: --backend" in error_of(lambda: check_backend("spark", RaySettings()))
    text = error_of(lambda: check_backend("transformers", RaySettings(ray_cpus=2)))
    assert "expected --backend ray beside them, got transformers. Fix: --backend ray" in text


def test_ray_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="backend: .*torchrun.*Fix: leave out torchrun"):
        plan_sharing(2, ForwardSettings(), ray=RaySettings())


# Commands


@pytest.fixture(scope="module")
def long_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(
        tmp_path_factory.mktemp("corpora") / "long.jsonl", num_samples=600
    )  # 332 units


def words_of(base: Path, data: Path, root: Path) -> list[str]:
    words = ["extract", "--base", str(base), "--data", str(data), "--out", str(root)]
    words += ["--unit-tokens", str(UNIT_TOKENS), "--device", "cpu", "--compute-dtype", "float32"]
    return [*PROGRAM, *words, "--tokenizer-workers", "1"]


@pytest.fixture(scope="module")
def long_original(
    tiny_base_folder: Path, long_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("stores") / "alone"
    subprocess.run(words_of(tiny_base_folder, long_data, root), check=True, capture_output=True)
    return root


def assert_same_as_alone(root: Path, original: Path) -> None:
    assert readable_content(root) == readable_content(original)
    assert verify(root, depth="full").is_complete
    assert set(files_below(root)) == set(files_below(original)), "leftovers"


def owners_after(process: subprocess.Popen[Any], root: Path, *, num_units: int) -> set[int]:
    """Wait for receipts of more units, and return the numbers of the processes with leases."""
    wanted, owners = num_receipts(root) + num_units, set[int]()
    deadline = time.monotonic() + PATIENCE_S
    while num_receipts(root) < wanted or not owners:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
        for path in (root / "units").glob(".[0-9]*.lease"):
            with suppress(FileNotFoundError, ValueError):  # given back; being written
                owners.add(json.loads(path.read_text())["pid"])
    return owners


def num_receipts(root: Path) -> int:
    return len(list((root / "units").glob("[0-9]*.json")))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_the_end_of(pids: set[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_command_that_is_killed_and_then_loses_an_actor_makes_the_store_of_one_process(
    tiny_base_folder: Path, long_data: Path, long_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    words = [*words_of(tiny_base_folder, long_data, root), "--backend", "ray", "--workers"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    killed = subprocess.Popen([*words, "1"], **streams)  # type: ignore[call-overload]
    owners = owners_after(killed, root, num_units=10)
    assert killed.pid not in owners
    killed.kill()
    killed.communicate()
    wait_for_the_end_of(owners)

    num_left = read_manifest(long_original).num_units - num_receipts(root)
    resumed = subprocess.Popen([*words, "2"], text=True, **streams)  # type: ignore[call-overload]
    os.kill(max(owners_after(resumed, root, num_units=10) - owners), signal.SIGKILL)
    output, errors = resumed.communicate(timeout=PATIENCE_S)
    assert resumed.returncode == 0, errors
    assert json.loads(output)["is_finished"], "one line, and nothing of Ray's"
    assert not RAYS_OWN.search(errors), errors
    died = re.search(r" has ended: its worker process has died(?:; (\d+) units)?", errors)
    assert died is not None, errors
    units = map(int, re.findall(r"^actor \d on .*: (\d+) units, ", errors, re.MULTILINE))
    # one that was committed as its actor died may be nobody's
    assert num_left - int(died[1] or 0) <= sum(units) <= num_left, errors
    assert "of 2 actors" in errors
    assert_same_as_alone(root, long_original)


@pytest.mark.slow
def test_a_unit_that_fails_on_a_cluster_is_told_in_one_line(
    cluster: Any,  # noqa: ANN401 -- untyped
    tiny_base_folder: Path,
    long_data: Path,
    long_original: Path,
    store_tmp: Path,
) -> None:
    root = Path(shutil.copytree(long_original, store_tmp / "store"))
    for unit in range(300, read_manifest(root).num_units):
        (root / receipt_path(unit)).unlink()
        (root / shard_path("final", unit)).unlink()
    tokens = root / row_path("tokens", 310)
    tokens.write_bytes(tokens.read_bytes()[:-9] + b"\0" * 9)
    words = [*words_of(tiny_base_folder, long_data, root), "--backend", "ray"]
    done = subprocess.run(
        [*words, "--ray-address", cluster.address], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [failed] = [line for line in done.stderr.splitlines() if "unit 310 failed" in line]
    assert failed.startswith("warning: unit 310 failed: ")
    assert "tokens" in failed
    assert "expected all units computed, got 1 that failed" in done.stderr.splitlines()[-1]
    assert not RAYS_OWN.search(done.stderr), done.stderr
    assert units_with_receipt(root) == set(range(read_manifest(root).num_units)) - {310}
    assert not list((root / "units").glob(".*.lease"))
