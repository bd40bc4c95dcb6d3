"""Projections on disk: found again by their key, computed again when a byte was changed."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from carryon.cache.files.atomic import one_writer
from carryon.cache.files.documents import digest_of, sealed, write_json
from carryon.cache.files.tensor_files import digest_tensors
from carryon.train.mixing.projection import FEATURES, ProjectedTargets
from carryon.train.mixing.projection_cache import cached_projection, projection_key


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRYON_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "projections"


def make_key(*, source: str = "b", num_positions: int = 3) -> dict[str, object]:
    return projection_key(
        anchor_fingerprint="a",
        source_fingerprint=source,
        map_digest="m",
        num_positions=num_positions,
        options={"states": "stable"},
    )


class Counted:
    """A computation that counts its calls."""

    def __init__(self) -> None:
        """Begin at none."""
        self.calls = 0

    def __call__(self) -> ProjectedTargets:
        """Return the same numbers each time."""
        self.calls += 1
        return ProjectedTargets(
            log_probs=torch.tensor([-1.0, -2.0, -0.5]),
            features=torch.arange(3.0 * len(FEATURES)).reshape(3, -1),
        )


def test_two_runs_that_compute_the_same_at_once_both_go_through(folder: Path) -> None:
    compute = Counted()
    folder.mkdir(parents=True)
    with one_writer(folder / digest_of(make_key())):  # the other run writes it just now
        made = cached_projection(make_key(), compute)
    assert torch.equal(made.log_probs, compute().log_probs)


def test_a_projection_is_computed_once_for_a_key(folder: Path) -> None:
    compute = Counted()
    first = cached_projection(make_key(), compute)
    second = cached_projection(make_key(), compute)

    assert compute.calls == 1
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.equal(first.features, second.features)
    assert [path.name for path in folder.iterdir()] == [digest_of(make_key())]


def test_another_store_is_another_key(folder: Path) -> None:
    compute = Counted()
    cached_projection(make_key(), compute)
    cached_projection(make_key(source="c"), compute)

    assert compute.calls == 2
    assert len(list(folder.iterdir())) == 2


def test_any_changed_byte_is_found_and_the_projection_computed_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Counted()
    expected = cached_projection(make_key(), compute)
    files = sorted(path for path in (folder / digest_of(make_key())).iterdir())
    assert len(files) == 2
    for number, path in enumerate(files):
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with caplog.at_level(logging.WARNING):
                found = cached_projection(make_key(), compute)
            assert "computed again" in caplog.text, (number, at)
            assert torch.equal(found.log_probs, expected.log_probs)
            caplog.clear()
        path.unlink()
        cached_projection(make_key(), compute)
        assert path.exists()
    assert compute.calls == 1 + 2 * 4


def test_numbers_of_another_shape_are_not_taken(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compute = Counted()
    key = make_key(num_positions=4)
    cached_projection(key, compute)
    with caplog.at_level(logging.WARNING):
        cached_projection(key, compute)

    assert compute.calls == 2
    assert "expected log_probs of shape [4] in float32" in caplog.text


def test_nothing_is_left_when_the_computation_fails(folder: Path) -> None:
    def fail() -> ProjectedTargets:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached_projection(make_key(), fail)

    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda each: each | {"log_probs": torch.tensor([-1.0, float("nan"), -2.0])}, "finite"),
        (lambda each: each | {"features": each["features"] / 0}, "finite"),
        (lambda each: each | {"log_probs": torch.tensor([-1.0, 0.5, -2.0])}, "at most 0"),
        (lambda each: each | {"more": torch.zeros(3)}, "expected log_probs and features"),
    ],
    ids=["nan", "infinite", "no probability", "more"],
)
def test_numbers_that_no_projection_has_are_computed_again_whoever_signed_them(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    text: str,
) -> None:
    key, compute = make_key(), Counted()
    expected = cached_projection(key, compute)
    place = folder / digest_of(key)
    path = place / "projection.safetensors"
    save_file(change(load_file(path)), path)
    files = {path.name: digest_tensors(path)}
    write_json(place / "projection.json", sealed({"key": key, "files": files}))
    with caplog.at_level(logging.WARNING):
        found = cached_projection(key, compute)

    assert compute.calls == 2
    assert text in caplog.text
    assert torch.equal(found.log_probs, expected.log_probs)


def test_a_file_that_is_larger_than_its_projection_is_not_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, compute = make_key(), Counted()
    cached_projection(key, compute)
    path = folder / digest_of(key) / "projection.safetensors"
    size = 1 << 40  # of zeros, which take no room on the disk
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"log_probs": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    with caplog.at_level(logging.WARNING):
        cached_projection(key, compute)

    assert compute.calls == 2
    assert "expected at most" in caplog.text


def test_a_file_in_the_place_of_the_folder_is_replaced(folder: Path) -> None:
    compute = Counted()
    folder.mkdir(parents=True)
    (folder / digest_of(make_key())).write_text("x")
    for _ in range(2):
        cached_projection(make_key(), compute)

    assert compute.calls == 1
