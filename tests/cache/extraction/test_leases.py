"""Leases: one owner at a time, and a dead one's is taken over; no clock of another node counts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from carryon.cache.errors import UnsafePathError
from carryon.cache.extraction.sharing import leases as leases_module
from carryon.cache.extraction.sharing.leases import Leases, LeaseTimes

TIMES = LeaseTimes(heartbeat_s=0.01, expiry_s=90.0)
PATIENCE_S = 300.0


class Clock:
    """The clock by which leases expire; a test moves it on, however slow the machine is."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases_module, "time", clock)
    return clock


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "units").mkdir()
    return tmp_path


def foreign_lease(root: Path, name: str, **changes: object) -> Path:
    """Make a lease as another node would have left it."""
    facts = {"host": "elsewhere", "machine": "another boot", "pid": 1, "process_started": "1"}
    path = root / f"units/.{name}.0.lease"
    path.write_text(json.dumps(facts | changes))
    return path


def test_a_lease_has_one_owner_and_is_free_again_when_it_is_given_back(root: Path) -> None:
    with Leases(root, TIMES) as one, Leases(root, TIMES) as other:
        assert one.take("3")
        assert not one.take("3")
        assert not other.take("3")
        assert other.take("4")
        assert one.units_of_others() == {4}
        one.release("3")
        assert other.take("3")
    assert list((root / "units").iterdir()) == []


def test_a_lease_that_is_touched_stays_and_one_that_is_not_is_taken_over(
    root: Path, clock: Clock
) -> None:
    path, owner = root / "units/.3.0.lease", Leases(root, TIMES)
    with Leases(root, TIMES) as other:
        with owner:
            assert owner.take("3")
            for _ in range(3):
                assert not other.take("3")
                touched = path.stat().st_mtime_ns
                wait_until(lambda before=touched: path.stat().st_mtime_ns > before)
                clock.now += 2 * TIMES.expiry_s
                assert not other.take("3")
        left = foreign_lease(root, "5")
        assert not other.take("5")  # never seen before: it may have been touched just now
        clock.now += 60
        os.utime(left)
        assert not other.take("5")
        clock.now += 60
        assert not other.take("5"), "the time is counted from the last change"
        clock.now += 60
        assert other.take("5")
        assert (root / "units/.5.1.lease").exists()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("offset_s", [-1e6, 1e6])
def test_the_clock_of_another_node_does_not_matter(
    root: Path, clock: Clock, offset_s: float
) -> None:
    left = foreign_lease(root, "5")
    with Leases(root, TIMES) as leases:
        assert not leases.take("5")
        for beat in range(5):
            os.utime(left, (time.time() + offset_s + beat / 100,) * 2)  # alive, by a wrong clock
            clock.now += 0.9 * TIMES.expiry_s
            assert not leases.take("5")
        clock.now += 1.1 * TIMES.expiry_s
        assert leases.take("5")


def test_of_many_only_one_takes_over(root: Path, clock: Clock) -> None:
    foreign_lease(root, "5")
    everyone = [Leases(root, TIMES) for _ in range(8)]
    for each in everyone:
        assert not each.take("5")
    clock.now += 1.1 * TIMES.expiry_s
    assert sum(each.take("5") for each in everyone) == 1


def test_the_lease_of_a_process_that_has_ended_on_this_machine_is_taken_at_once(root: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from carryon.cache.extraction.sharing.leases import Leases\n"
        "print(Leases(Path(sys.argv[1])).take('5'), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    with Leases(root) as leases:  # expires after 90 s
        assert not leases.take("5")
        process.kill()
        while process.stdout.read():
            pass
        wait_until(lambda: leases.take("5"))  # also while it is a zombie
    process.communicate()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"machine": 1, "pid": -1}'])
def test_a_lease_with_any_content_expires_like_another(
    root: Path, clock: Clock, content: str
) -> None:
    (root / "units/.5.0.lease").write_text(content)
    with Leases(root, TIMES) as leases:
        assert not leases.take("5")
        clock.now += 1.1 * TIMES.expiry_s
        assert leases.take("5")


def test_a_link_in_place_of_a_lease_is_refused(root: Path) -> None:
    target = root / "target"
    (root / "units/.5.0.lease").symlink_to(target)
    with Leases(root, TIMES) as leases, pytest.raises(UnsafePathError):
        leases.take("5")
    assert not target.exists()
