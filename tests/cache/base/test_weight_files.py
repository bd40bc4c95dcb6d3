"""Safetensors files of a base, read without staying in the memory of this process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny_bases import make_tiny_base

from carryon.cache.base.model import load_base
from carryon.cache.base.weights import files
from carryon.cache.base.weights.files import WeightFile
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings

STATUS = Path("/proc/self/status")
MEGABYTE = 1 << 20


def resident_bytes() -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


def read_bytes() -> int:
    """All that this process has read by calls of the system."""
    return int(STATUS.with_name("io").read_text().split("rchar: ")[1].split()[0])


def test_pieces_are_the_rows_of_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("carryon.cache.base.identity.PIECE_ITEMS", 10)  # 3 rows of 7 a piece
    monkeypatch.setattr(files, "_MAX_MAPPED_BYTES", 30)  # opened again in the middle
    weights = {
        "wide": torch.arange(28, dtype=torch.bfloat16).reshape(4, 7),
        "flat": torch.arange(23, dtype=torch.float32),
        "scalar": torch.tensor(5.0),
        "none": torch.empty(0, 3),
    }
    save_file(weights, tmp_path / "w.safetensors")
    file = WeightFile(str(tmp_path / "w.safetensors"))
    assert sorted(file.names()) == sorted(weights)
    for name, weight in weights.items():
        assert file.shape(name) == tuple(weight.shape)
        pieces = list(file.pieces(name))
        assert all(piece.dtype == weight.dtype for piece in pieces)
        read = torch.cat([piece.reshape(-1) for piece in pieces] or [torch.empty(0)])
        assert torch.equal(read, weight.reshape(-1)), name
    assert [len(piece) for piece in file.pieces("wide")] == [1] * 4
    assert [len(piece) for piece in file.pieces("flat")] == [10, 10, 3]


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_a_large_weight_is_never_in_memory_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither read for each piece, as safetensors does of a file that is not mapped, nor mapped."""
    monkeypatch.setattr(files, "_MAX_MAPPED_BYTES", MEGABYTE)
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(256, 128 * 1024, dtype=torch.uint8)}, path)  # 32 MB
    file, total = WeightFile(str(path)), 0
    before = peak = resident_bytes()
    read_before = read_bytes()
    for piece in file.pieces("w"):
        total += int(piece.sum())
        peak = max(peak, resident_bytes())
    file.close()
    assert total == 32 * MEGABYTE
    assert peak - before < 16 * MEGABYTE
    assert read_bytes() - read_before < 2 * 32 * MEGABYTE


@pytest.mark.parametrize(("compute_dtype", "backend"), [("bfloat16", "mmap"), ("float32", "pread")])
def test_weights_that_are_converted_are_not_mapped(
    compute_dtype: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = []

    def opener(path: str, **how: Any) -> Any:  # noqa: ANN401
        backends.append(how["backend"])
        return safe_open(path, **how)

    folder = make_tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", opener)
    forward = ForwardSettings(device="cpu", compute_dtype=compute_dtype)  # type: ignore[arg-type]
    load_base(str(folder), forward=forward)
    assert backends == [backend]
    assert transformers.modeling_utils.safe_open is opener


def test_transformers_maps_again_after_a_base_that_does_not_load(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    (folder / "model.safetensors").write_bytes(b"none")
    before = transformers.modeling_utils.safe_open
    with pytest.raises(InputError, match="could not be loaded"):
        load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    assert transformers.modeling_utils.safe_open is before
