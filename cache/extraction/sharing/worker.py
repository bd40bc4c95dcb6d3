"""A process beside another one that extracts: it loads the base and claims units of the plan.

Not a command for users: its job is a JSON line on standard input, and when that is closed, as when
the process that started it is killed, it stops as by Ctrl-C.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carryon.cache.base.model import Base
    from carryon.cache.extraction.sharing.claims import Claims
    from carryon.cache.format.manifest import Manifest

INTERRUPTED = 130


def run_worker(job: dict[str, Any]) -> None:
    """Load the base of the job and compute units until each has a receipt.

    Raises:
        SettingMismatchError: the store or the base is not the one of the job.
    """
    from carryon.cache.extraction.forward import run_units, units_to_do

    root = Path(job["root"])
    with opened_store(job) as (manifest, base, claims):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there are leases
        run_units(
            root,
            manifest,
            base,
            batch_tokens=job["forward"]["batch_tokens"],
            max_disk_bytes=job["max_disk_bytes"],
            units=units_to_do(root, manifest),
            claims=claims,
            num_encoders=job["num_threads"],
        )


@contextmanager
def opened_store(job: dict[str, Any]) -> Iterator["tuple[Manifest, Base, Claims]"]:
    """Yield manifest, loaded base and claims of a job; leases are released at the end.

    Raises:
        SettingMismatchError: the store or the base is not the one of the job.
    """
    import torch

    from carryon.cache.base.model import load_base
    from carryon.cache.base.recorded import tokenizer_of
    from carryon.cache.errors import SettingMismatchError
    from carryon.cache.extraction.resume import refuse_other_base
    from carryon.cache.extraction.sharing.claims import Claims
    from carryon.cache.extraction.sharing.leases import Leases, LeaseTimes
    from carryon.cache.format.manifest import read_manifest
    from carryon.cache.lock import write_lock
    from carryon.cache.settings import ForwardSettings

    torch.set_num_threads(job["num_threads"])
    root, forward = Path(job["root"]), ForwardSettings.from_dict(job["forward"])
    heartbeat_s, expiry_s = job["times"]
    times = LeaseTimes(heartbeat_s=heartbeat_s, expiry_s=expiry_s)
    manifest = read_manifest(root)
    base = load_base(job["base"], forward=forward, like=tokenizer_of(manifest.base))
    refuse_other_base(manifest, base, name=str(root))
    with write_lock(root, is_shared=True), Leases(root, times) as leases:
        manifest = read_manifest(root)
        if manifest.fingerprint != job["fingerprint"]:
            raise SettingMismatchError(
                f"{root}: expected the plan {job['fingerprint'][:12]}, got "
                f"{manifest.fingerprint[:12]}: samples were appended while a worker started. "
                "Fix: run the same command to resume"
            )
        yield manifest, base, Claims(root, manifest, leases)


def _stop_with_input() -> None:
    """Interrupt the main thread when standard input is closed."""
    while os.read(0, 1):  # not by sys.stdin, whose lock this thread would hold at the end
        pass
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def main() -> int:
    """Run the job on standard input and return the exit code."""
    # Ctrl-C ends the process at once while it only imports and loads: raised there it may be lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        job = json.loads(sys.stdin.buffer.readline())
        threading.Thread(target=_stop_with_input, daemon=True).start()
        from carryon.cache.errors import CarryOnError

        try:
            run_worker(job)
        except CarryOnError as error:
            text = " ".join(str(error).split())
            print(f"worker {job['number'] + 1}: error: {text}", file=sys.stderr, flush=True)
            return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
