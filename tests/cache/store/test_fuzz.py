"""Stores with random values in their documents, every digest valid: success, or one line."""

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_stores import make_given, write_store

from carryon.cache.errors import CarryOnError
from carryon.cache.extraction.repair import repair
from carryon.cache.files.documents import json_bytes
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.trust.mutations import mutate
from carryon.tools.bench.trust.signing import replace_planned, sign_manifest, sign_receipt

VALUES = st.one_of(
    st.sampled_from([0, -1, 1, 7, 63, 64, 65, 10**6, 1 << 24, 1 << 31, 10**12, 1 << 63, 1 << 70]),
    st.sampled_from([None, True, False, 0.5, -0.5, 1e300, "", "x", "0" * 64, "a\0b", "a\nb"]),
    st.sampled_from(["/dev/zero", "../canary", "final", "layer.2", "bfloat16", "object", "near"]),
    st.sampled_from([[], {}, [0], [10**12], ["final"], {"a": 1}, [[]] * 3, {"x": {"y": []}}]),
    st.integers(-(1 << 40), 1 << 40),
    st.text(max_size=6),
)
DOCUMENTS = [
    "zarr.json",
    receipt_path(0),
    receipt_path(1),
    *(
        f"{name}/zarr.json"
        for name in ("samples/start", "samples/id", "probe/rows", "head/lm_head", "hidden/final")
    ),
]
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True), st.sampled_from(["set", "drop", "rename", "add"]), VALUES
    ),
    min_size=1,
    max_size=3,
)
MAX_SECONDS, MAX_KILOBYTES = 5, 1 << 20


def use(root: Path) -> None:
    """Open, read, verify and repair a store; each may refuse it."""
    for call in (read_all, lambda path: verify(path, depth="full"), repair_without_base):
        started_at = time.perf_counter()
        line = ""
        try:
            call(root)
        except CarryOnError as error:
            line = str(error)
        assert "\n" not in line
        assert time.perf_counter() - started_at < MAX_SECONDS


def read_all(root: Path) -> None:
    store = Store.open(root)
    store.head()
    for sample in store:
        assert len(sample.tokens) == len(sample.hidden[store.taps[0]])


def repair_without_base(root: Path) -> None:
    repair(root, base="./no/such/base")


def test_any_value_in_a_signed_document_ends_as_success_or_one_line(
    store_tmp: Path, request: pytest.FixtureRequest
) -> None:
    original, root = store_tmp / "original", store_tmp / "shared" / "store"
    write_store(original, make_given())
    canary = store_tmp / "shared" / "canary"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=request.config.getoption("--fuzz"),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(path=st.sampled_from(DOCUMENTS), changes=CHANGES)
    def check(path: str, changes: list[tuple[float, str, Any]]) -> None:
        shutil.rmtree(root.parent, ignore_errors=True)
        shutil.copytree(original, root)
        canary.write_bytes(b"of the user")
        if path == "zarr.json":
            sign_manifest(root, lambda values: mutate(values, changes))
        elif path.startswith("units/"):
            sign_receipt(root, int(path[6]), lambda values: mutate(values, changes))
        else:
            document = json.loads((root / path).read_bytes())
            mutate(document, changes)
            replace_planned(root, path, json_bytes(document))
        use(root)
        assert sorted(each.name for each in root.parent.iterdir()) == ["canary", "store"]
        assert canary.read_bytes() == b"of the user"

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MAX_KILOBYTES
