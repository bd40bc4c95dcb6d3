"""A base on the hub: while it answers, and when it no longer does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys, time
from pathlib import Path
from support.tiny_hub import run_tiny_hub

folder = Path(sys.argv[1])
with run_tiny_hub() as hub:
    import os
    os.environ["HF_ENDPOINT"] = hub.url
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["anna/base"] = files
    from carryon.cache.base.source import hub as asked
    from carryon.cache.base.model import load_base
    from carryon.cache.errors import CarryOnError
    from carryon.cache.settings import ForwardSettings

    logging.basicConfig(level="INFO", stream=sys.stdout)
    forward = ForwardSettings(device="cpu", compute_dtype="float32")
    online = load_base("anna/base", forward=forward)

    def fail(name):
        try:
            load_base(name, forward=forward)
        except CarryOnError as error:
            print(error)

    fail("anna/none")
    num_requests = len(hub.requests)
    assert asked.is_hub_reachable("anna/base", None)
    assert asked.is_hub_reachable("no name at all", None)
    assert len(hub.requests) == num_requests

asked.is_hub_reachable.cache_clear()  # as a new process
began = time.perf_counter()
again = load_base("anna/base", forward=forward)
fail("anna/none")
fail("anna/base@none")
assert time.perf_counter() - began < 10
assert again.identity == online.identity
"""


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once_and_its_cache_is_taken(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", PROGRAM, str(tiny_base_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    lines = done.stdout.splitlines()
    errors = [line for line in lines if "Fix: check the name, the folder and the conn" in line]
    assert len(errors) == 3
    assert all(line.startswith("base anna/") for line in errors)
    said = [line for line in lines if "cannot be reached (" in line]
    assert [line.split()[1] for line in said] == ["anna/base:", "anna/none:", "anna/base:"], lines
    assert all("looking into the cache of earlier downloads" in line for line in said)
