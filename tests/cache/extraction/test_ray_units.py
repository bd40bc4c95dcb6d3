"""Units as the actors of Ray get them, without Ray: what is handed out, what became of each."""

import shutil
import threading
from pathlib import Path

import pytest
from support.tiny_stores import FORWARD, error_of, readable_content

from carryon.cache.base.model import Base
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.ray_actors.computing import with_whole_paths
from carryon.cache.extraction.ray_actors.ledger import Ledger
from carryon.cache.extraction.ray_actors.orders import Orders, Outcome
from carryon.cache.extraction.ray_actors.slots import Slot, count_slots, plan_slot
from carryon.cache.extraction.sharing.claims import Claims
from carryon.cache.extraction.sharing.leases import Leases
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import receipt_path, row_path, shard_path
from carryon.cache.settings import RaySettings

CPUS, GPUS = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}
HEAD: dict[str, float] = {"object_store_memory": 1e9}


def unfinished(store: Path, to: Path) -> Path:
    """Return a copy of a store without its units."""
    root = Path(shutil.copytree(store, to))
    for unit in range(read_manifest(root).num_units):
        (root / receipt_path(unit)).unlink()
        (root / shard_path("final", unit)).unlink()
    return root


def ordered(
    root: Path, base: Base, units: list[int], *, max_disk_bytes: int | None = None
) -> dict[int, Outcome]:
    """Order units at once, as from threads of an actor, and return what became of each."""
    manifest = read_manifest(root)
    with Leases(root) as leases:
        orders = Orders(Claims(root, manifest, leases))
        outcomes: dict[int, Outcome] = {}

        def order(unit: int) -> None:
            outcomes[unit] = orders.extract(unit)

        def run() -> None:
            run_units(
                root,
                manifest,
                base,
                batch_tokens=FORWARD.batch_tokens,
                max_disk_bytes=max_disk_bytes,
                units=[],
                claims=orders,
            )

        callers = [threading.Thread(target=order, args=(unit,)) for unit in units]
        server = threading.Thread(target=orders.serve, args=(run,))
        for each in [*callers, server]:
            each.start()
        for each in callers:
            each.join(timeout=300)
            assert not each.is_alive()
        orders.close()
        server.join(timeout=300)
        assert not server.is_alive()
    assert not list((root / "units").glob(".*.lease"))
    return outcomes


def states_of(outcomes: dict[int, Outcome]) -> dict[int, str]:
    return {unit: outcome.state for unit, outcome in sorted(outcomes.items())}


def test_ordered_units_are_those_of_a_process_alone(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = unfinished(store_original, store_tmp / "store")
    units = list(range(read_manifest(root).num_units))

    outcomes = ordered(root, tiny_base, units)

    assert states_of(outcomes) == dict.fromkeys(units, "computed")
    assert readable_content(root) == readable_content(store_original)
    manifest = read_manifest(root)
    assert sum(each.num_tokens for each in outcomes.values()) == manifest.num_tokens
    assert states_of(ordered(root, tiny_base, [1])) == {1: "present"}


def test_a_unit_that_fails_does_not_stop_the_others(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = unfinished(store_original, store_tmp / "store")
    units = list(range(read_manifest(root).num_units))
    tokens = root / row_path("tokens", 1)
    tokens.write_bytes(tokens.read_bytes()[:-9] + b"\0" * 9)

    outcomes = ordered(root, tiny_base, units)

    assert states_of(outcomes) == dict.fromkeys(units, "computed") | {1: "failed"}
    assert "\n" not in outcomes[1].error
    assert "tokens" in outcomes[1].error


def test_a_unit_that_cannot_be_written_does_not_stop_the_others(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = unfinished(store_original, store_tmp / "store")
    units = list(range(read_manifest(root).num_units))
    (root / shard_path("layer.1", 1)).unlink()
    (root / shard_path("layer.1", 1)).mkdir()

    outcomes = ordered(root, tiny_base, units)

    assert states_of(outcomes) == dict.fromkeys(units, "computed") | {1: "failed"}
    assert "expected a file, got a folder" in outcomes[1].error


def test_an_error_of_the_base_is_one_that_another_process_may_not_have(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = unfinished(store_original, store_tmp / "store")
    units = list(range(read_manifest(root).num_units))
    calls = iter(range(10_000))

    def fails_once(*_: object) -> None:
        if next(calls) == 1:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    hook = tiny_base.model.get_decoder().register_forward_pre_hook(fails_once)
    outcomes = ordered(root, tiny_base, units)
    hook.remove()

    assert sorted(states_of(outcomes).values()) == ["broken", *["computed"] * (len(units) - 1)]
    [broken] = [each for each in outcomes.values() if each.state == "broken"]
    assert broken.error == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_unit_of_another_process_is_busy_and_a_disk_limit_is_told(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    root = unfinished(store_original, store_tmp / "store")
    with Leases(root) as others:
        assert others.take("1")
        assert states_of(ordered_beside(root, tiny_base)) == {0: "computed", 1: "busy"}
    outcomes = ordered(root, tiny_base, [1, 2], max_disk_bytes=1000)
    assert states_of(outcomes) == {1: "limit", 2: "limit"}


def ordered_beside(root: Path, base: Base) -> dict[int, Outcome]:
    manifest = read_manifest(root)
    with Leases(root) as leases:
        orders = Orders(Claims(root, manifest, leases))
        how: dict[str, object] = {"batch_tokens": 256, "max_disk_bytes": None, "units": []}
        server = threading.Thread(
            target=orders.serve,
            args=(lambda: run_units(root, manifest, base, claims=orders, **how),),  # type: ignore[arg-type]
        )
        server.start()
        outcomes = {unit: orders.extract(unit) for unit in (0, 1)}
        orders.close()
        server.join(timeout=300)
    return outcomes


def test_leases_of_a_dead_process_are_taken_at_once_and_no_others(store_folder: Path) -> None:
    with (
        Leases(store_folder) as living,
        Leases(store_folder) as dead,
        Leases(store_folder) as next_,
    ):
        assert living.take("1")
        assert dead.take("2")
        (store_folder / "units/.9.0.lease").write_text("not of a process")
        assert [next_.take(name) for name in ("1", "2", "9")] == [False, False, False]
        living.mark_ended({dead.token})
        assert [next_.take(name) for name in ("1", "2", "9")] == [False, True, False]
        assert living.units_of_others() == {2, 9}, "the unit may have files of the dead process"


# Which units are handed out


def outcome(unit: int, state: str, error: str = "") -> Outcome:
    return Outcome(unit=unit, state=state, error=error)  # type: ignore[arg-type]


def test_units_are_handed_out_in_order_and_busy_ones_later() -> None:
    ledger = Ledger([3, 1, 2])
    assert [ledger.hand_out(0.0, is_idle=True) for _ in range(4)] == [1, 2, 3, None]
    ledger.settle(outcome(2, "busy"), 10.0)
    ledger.settle(outcome(1, "computed"), 10.0)
    ledger.settle(outcome(3, "present"), 10.0)
    assert not ledger.is_over
    assert ledger.hand_out(10.5, is_idle=True) is None
    assert ledger.hand_out(11.5, is_idle=False) == 2
    ledger.settle(outcome(2, "present"), 12.0)
    assert ledger.is_over
    assert not ledger.failed


def test_a_unit_that_ends_its_process_is_given_up_and_one_that_fails_at_once() -> None:
    ledger = Ledger([1, 2])
    tries = 0
    while not ledger.is_over:
        unit = ledger.hand_out(0.0, is_idle=True)
        if unit == 2:
            ledger.settle(outcome(2, "failed", "damaged"), 0.0)
        else:
            assert unit == 1
            tries += 1
            ledger.lose(1, "out of memory", 0.0)
    assert tries == 4
    assert ledger.failed == {1: "tried 4 times: out of memory", 2: "damaged"}


def test_units_beside_one_that_ends_its_process_are_tried_alone() -> None:
    ledger = Ledger([1, 2, 3])
    for unit in (1, 2):
        assert ledger.hand_out(0.0, is_idle=False) == unit
        assert not ledger.is_suspect(unit)
    for unit in (1, 2):
        ledger.lose(unit, "killed", 0.0)
    assert ledger.hand_out(0.0, is_idle=False) == 3
    assert ledger.hand_out(0.0, is_idle=False) is None
    assert ledger.hand_out(0.0, is_idle=True) == 1
    assert ledger.is_suspect(1)
    ledger.settle(outcome(1, "busy"), 0.0)
    assert ledger.hand_out(5.0, is_idle=False) is None
    assert (ledger.hand_out(5.0, is_idle=True), ledger.hand_out(5.0, is_idle=True)) == (2, 1)


def test_a_process_that_was_taken_away_does_not_count() -> None:
    ledger = Ledger([1])
    for _ in range(10):
        assert ledger.hand_out(0.0, is_idle=True) == 1
        ledger.lose(1, "the node was preempted", 0.0, counts=False)
    assert not ledger.failed


@pytest.mark.parametrize("state", ["full", "limit"])
def test_a_full_disk_ends_the_job_when_all_that_is_out_is_back(state: str) -> None:
    ledger = Ledger([1, 2, 3])
    assert (ledger.hand_out(0.0, is_idle=True), ledger.hand_out(0.0, is_idle=True)) == (1, 2)
    ledger.settle(outcome(1, state), 0.0)
    assert ledger.hand_out(0.0, is_idle=True) is None
    assert not ledger.is_over
    ledger.settle(outcome(2, "computed"), 0.0)
    assert ledger.is_over
    assert ledger.stopped == outcome(1, state)


def test_a_job_whose_units_all_fail_ends_early() -> None:
    ledger = Ledger(range(1000))
    while (unit := ledger.hand_out(0.0, is_idle=True)) is not None:
        ledger.settle(outcome(unit, "failed", "damaged"), 0.0)
    assert ledger.is_over
    assert len(ledger.failed) == 20


# How many actors


def test_a_job_names_files_by_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    forward = {"device": "auto", "device_map": "places.json", "offload_folder": "off"}
    job = with_whole_paths({"root": "/store", "base": "base", "forward": forward})
    places, folder = str(tmp_path / "places.json"), str(tmp_path / "off")
    whole = {"device": "auto", "device_map": places, "offload_folder": folder}
    assert job == {"root": "/store", "base": str(tmp_path / "base"), "forward": whole}
    by_id = {"base": "org/base", "forward": {"device_map": "auto"}}
    assert with_whole_paths(by_id) == by_id


@pytest.mark.parametrize(
    ("nodes", "given", "slot", "count"),
    [
        ([HEAD, GPUS, GPUS], {}, Slot(cpus=1, gpus=1), 8),
        ([HEAD, GPUS, GPUS], {"cpus": 6}, Slot(cpus=6, gpus=1), 4),
        ([GPUS, GPUS], {"gpus": 3}, Slot(cpus=1, gpus=3), 2),
        ([GPUS, CPUS], {"device": "cpu"}, Slot(cpus=8, gpus=0), 3),
        ([CPUS, CPUS], {}, Slot(cpus=8, gpus=0), 2),
        ([CPUS, CPUS], {"workers": 8}, Slot(cpus=2, gpus=0), 8),
        ([CPUS, CPUS], {"workers": 1}, Slot(cpus=8, gpus=0), 2),
        ([CPUS, CPUS], {"cpus": 3}, Slot(cpus=3, gpus=0), 4),
        ([{"CPU": 2.0}], {"workers": 5}, Slot(cpus=1, gpus=0), 2),
        ([HEAD], {"device": "cuda", "workers": 4}, Slot(cpus=1, gpus=1), 0),
    ],
)
def test_an_actor_gets_a_gpu_or_its_share_of_the_cpus(
    nodes: list[dict[str, float]], given: dict[str, int], slot: Slot, count: int
) -> None:
    asked = {"device": "auto", "workers": 0, "cpus": 0, "gpus": 1} | given
    assert plan_slot(nodes, **asked) == slot  # type: ignore[arg-type]
    assert count_slots(nodes, slot) == count


def test_more_cpus_than_a_node_has_are_refused() -> None:
    text = error_of(lambda: plan_slot([CPUS], device="cpu", workers=0, cpus=9, gpus=1))
    assert "ray_cpus: expected at most the 8 of the largest node, got 9. Fix: --ray-cpus 8" in text
    assert "ray_cpus: expected 0 or more, got -1" in error_of(lambda: RaySettings(ray_cpus=-1))
