"""Stores, carry-ons and merged checkpoints from before the folders moved: all open, same values.

`tests/data/README.md` says what made them.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from carryon.cache import device
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.train.inference.modeling import CarryOnForCausalLM

ARCHIVE = Path(__file__).parent / "data/before.tar.xz"
CPU = ForwardSettings(device="cpu", compute_dtype="float32")
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in the archive, and `expected.json`."""
    root = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(
            root, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # since 3.11.4
    return root


@pytest.fixture(scope="module")
def expected(before: Path) -> dict[str, Any]:
    """What the code of that time read and computed."""
    found: dict[str, Any] = json.loads((before / "expected.json").read_text())
    return found


@pytest.mark.parametrize("name", ["store", "store-near"])
def test_a_store_reads_the_same_states(
    name: str, before: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(before / name), "--full"]) == 0
    store = Store.open(before / name)
    assert store.fingerprint == expected[name]["fingerprint"]
    assert store.num_samples == expected[name]["num_samples"]
    for tap, digest in expected[name]["states_sha256"].items():
        read = hashlib.sha256()
        for number in range(store.num_units):
            unit = store.read_unit(number, taps=[tap])
            used = int(unit.starts[-1] + unit.lengths[-1])
            read.update(np.ascontiguousarray(unit.hidden[tap][:used]).tobytes())
        assert read.hexdigest() == digest, tap


@pytest.mark.parametrize("kind", ["bottleneck", "native", "top-lora"])
def test_a_carryon_gives_the_same_loss(
    kind: str,
    before: Path,
    expected: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It was computed where a CPU multiplies bfloat16, which rounds the carry-on's products.
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: True)
    argv = ["--store", str(before / "store"), "--carryon", str(before / kind), "--device", "cpu"]
    assert main(["evaluate", *argv]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base_nll"] == pytest.approx(expected[kind]["base_nll"], abs=1e-5)
    assert result["carryon_nll"] == pytest.approx(expected[kind]["carryon_nll"], abs=1e-5)


def test_a_carryon_on_its_base_gives_the_same_logits(
    before: Path, expected: dict[str, Any]
) -> None:
    model = CarryOnForCausalLM.from_pretrained(
        before / "bottleneck", base=str(before / "base"), forward=CPU
    )
    with torch.no_grad():
        logits = model(IDS).logits[0, -1, :8]
    assert logits.tolist() == pytest.approx(expected["bottleneck"]["logits"], abs=1e-5)


def test_a_merged_checkpoint_gives_the_same_logits(before: Path, expected: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(before / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = model(IDS).logits[0, -1, :8]
    assert logits.tolist() == pytest.approx(expected["merged"]["logits"], abs=1e-5)
