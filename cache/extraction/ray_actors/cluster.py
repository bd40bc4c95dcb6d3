"""A connection to Ray that prints nothing: to a cluster that runs, or to one started here.

Ray's own logs are in /tmp/ray/session_latest/logs of each node.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.extraction.ray_actors.slots import Node
from carryon.cache.optional import require

_OBJECT_STORE_BYTES = 80 << 20  # near Ray's minimum: only numbers pass through it
_QUIET: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning in each process
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # every error is read from its result
}


@contextmanager
def connected(address: str, *, num_cpus: int) -> Iterator[ModuleType]:
    """Yield the module `ray`, connected; what runs there for this process ends with the block.

    Args:
        address: `HOST:PORT` of a cluster, or `auto` for the one of this node. Empty: that of
            RAY_ADDRESS, or a cluster of this machine alone, which ends with the block.
        num_cpus: of such a cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: there is no cluster at the address, or Ray is in use by this program.
    """
    address = address or os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise InputError(
            "ray_address: expected HOST:PORT or auto, as the plan is written from within the "
            f"cluster, got {address}. Fix: ray job submit --address {address} -- carryon ..."
        )
    how: dict[str, Any] = {"address": address}
    if not address:
        how = {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    with _environment(is_local=not address), _quiet() as ray:
        if ray.is_initialized():
            raise InputError(
                "backend: expected no connection to Ray in this program, got one. "
                "Fix: ray.shutdown() before it"
            )
        try:
            ray.init(**how, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            where = f"a cluster at {address}" if address else "a cluster on this machine"
            raise InputError(
                f"ray_address: expected {where}, got: {reason}. Fix: ray status, on its head node"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def nodes_of(ray: ModuleType) -> list[Node]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextmanager
def _environment(*, is_local: bool) -> Iterator[None]:
    """Set variables that Ray, and the processes that it starts here, read."""
    changes = {name: value for name, value in _QUIET.items() if name not in os.environ}
    if is_local:
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # scripts change it
        if "RAY_TMPDIR" not in os.environ:  # TMPDIR may be longer than paths of sockets may be
            changes["RAY_TMPDIR"] = "/tmp"
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[ModuleType]:
    """Yield the module `ray` with its messages turned off."""
    ray = require("ray", extra="ray", purpose="--backend ray")
    from ray._private import worker

    log, shows = logging.getLogger("ray"), worker._worker_logs_enabled
    level = log.level
    log.setLevel(logging.CRITICAL)
    # Deaths are printed on standard output, and no option turns that off: log_to_driver is of what
    # actors print. A test with a death looks whether this still does.
    worker._worker_logs_enabled = False
    try:
        yield ray
    finally:
        worker._worker_logs_enabled = shows
        log.setLevel(level)
