"""A changed carry-on is noticed, and one made to do harm is refused before anything is built."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_carryons import resign
from torch import Tensor

from carryon.cache.errors import CarryOnError, InputError
from carryon.train.config import CarryOnSettings
from carryon.train.inference.adapters import CarryOnSet
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_file import CARD, MAX_CARD_BYTES, WEIGHTS
from carryon.train.modules.carryon import make_carryon
from carryon.train.modules.serialization import (
    load_carryon,
    locate_carryon,
    read_card,
    read_weights,
    save_carryon,
    write_alpha,
)

SETTINGS = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)
BASE = {"id": "org/tiny", "weights_sha256": "ab" * 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A carry-on as it is saved."""
    card = CarryOnCard(
        settings=SETTINGS.to_dict(),
        base_width=16,
        base=BASE,
        store_fingerprint="cd" * 32,
        split={"held_out_ratio": 0.05, "seed": 0},
        alpha=0.75,
        figures={"held_out_nll_of_base": 1.25},
        versions={"torch": "2"},
    )
    carryon = build_bottleneck(SETTINGS, base_width=16, seed=0)
    save_carryon(tmp_path / "carryon", carryon, card, dtype=torch.float32)
    return tmp_path / "carryon"


def assert_refused(folder: Path) -> str:
    with pytest.raises(CarryOnError) as caught:
        load_carryon(folder)
    with pytest.raises(CarryOnError):
        CarryOnSet(BASE).put("x", read_weights(folder), read_card(folder))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for position in range(0, 8 * len(content), 8 * len(content) // 97):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        (folder / name).write_bytes(changed)
        assert str(folder) in assert_refused(folder)
    (folder / name).write_bytes(content[:-1])
    assert_refused(folder)
    (folder / name).write_bytes(content)
    load_carryon(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"alpha": float("nan")}, "alpha: expected 0 to 10"),
        ({"alpha": 1e9}, "alpha: expected 0 to 10"),
        ({"alpha": "1"}, "alpha: expected int or float, got '1'"),
        ({"alpha": True}, "alpha: expected int or float, got True"),
        ({"base_width": 10**9}, "base_width: expected the width of the base"),
        ({"base_width": "16"}, "base_width: expected int"),
        ({"base": []}, "base: expected dict"),
        ({"base": {"id": None}}, "base: id: expected str, got None"),
        ({"base": BASE | {"id": "x" * 10**5}}, "expected a length of at most 4096"),
        ({"base": BASE | {"weights_sha256": 3}}, "base: weights_sha256: expected str"),
        ({"base": BASE | {"width": 10**9}}, "base_width: expected the width of the base"),
        ({"base": BASE | {"vocab_size": 10**30}}, "vocab_size'?: expected a number below"),
        ({"base": BASE | {"vocab_size": [1]}}, "vocab_size'?: expected str or int or float"),
        ({"figures": {"x": []}}, "figures: 'x': expected"),
        ({"versions": {"x": 1}}, "versions: 'x': expected str"),
        ({"split": {"held_out_ratio": 2}}, "split: expected a ratio in 0 to 1"),
        ({"split": {"seed": -1}}, "split: expected a ratio in 0 to 1 and a seed"),
        ({"split": {"stores": [1]}}, "split: stores: expected str"),
        ({"split": []}, "split: expected an object"),
        ({"settings": []}, "settings: expected an object"),
        ({"framing": []}, "framing: expected an object"),
        ({"store_fingerprint": {}}, "store_fingerprint: expected str"),
        ({"figures": None}, "expected the keys"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_a_signed_card_of_wrong_values_is_refused(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    resign(folder, **changes)
    with pytest.raises(InputError, match=text):
        load_carryon(folder)
    assert_refused(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"blocks": 10**8}, "blocks: expected 1 to 1024"),
        ({"blocks": 1000}, "blocks: expected sizes that fit the 15 tensors"),
        ({"blocks": "2"}, "blocks: expected a whole number, got '2'"),
        ({"blocks": 1.5}, "blocks: expected a whole number"),
        ({"width": 10**9}, "width: expected 2 to 65536"),
        ({"width": 65536}, "width: expected sizes that fit"),
        ({"intermediate_size": 1 << 18}, "intermediate_size: expected sizes that fit"),
        ({"intermediate_size": 16}, "weights: .*: expected"),
        ({"taps": ["../x"]}, "taps: expected final, prenorm or layer.K, got '../x'"),
        ({"taps": "final"}, "taps: expected a list"),
        ({"taps": [["final"]]}, "taps: expected a list"),
        ({"taps": [f"layer.{n}" for n in range(1, 10_000)]}, "taps: expected sizes that fit"),
        ({"gate": ["channel"]}, "gate: expected channel, token or none"),
        ({"gate": 1}, "gate: expected channel, token or none"),
        ({"dropout": float("nan")}, "dropout: expected 0 or more"),
        ({"kind": {}}, "kind: expected a text"),
        ({"kind": "native", "blocks": 1000}, "blocks: expected sizes|expected its base"),
        ({"kind": "../x"}, "kind: expected one of"),
        ({"lora_rank": 10**12}, "lora_rank: expected"),
    ],
)
def test_signed_sizes_that_do_not_fit_are_refused_at_once(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    resign(folder, settings=SETTINGS.to_dict() | changes)
    start = time.perf_counter()
    with pytest.raises(InputError, match=text):
        load_carryon(folder)
    assert_refused(folder)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 10**6, "expected JSON"),
        (b'{"a":' * 10**6, "expected JSON"),
        (b" " * (MAX_CARD_BYTES + 1), "expected at most"),
        (b"[]", "expected a JSON object"),
        (b"1" * 5000, "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"", "expected JSON"),
        (b'{"sha256": 1}', "differs from its SHA-256"),
        (b'{"sha256": [], "files": 3}', "differs from its SHA-256"),
    ],
)
def test_a_card_that_is_no_small_json_object_is_refused(
    folder: Path, content: bytes, text: str
) -> None:
    (folder / CARD).write_bytes(content)
    assert text in assert_refused(folder)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_only_regular_files_are_read(folder: Path, tmp_path: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (tmp_path / "real").write_bytes(content)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "real")
    assert "expected a file, got a link" in assert_refused(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "expected a file, got a link" in assert_refused(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert "expected a file" in assert_refused(folder)
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    assert "expected a file" in assert_refused(folder)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs_only(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--org--x"
    snapshot = cached / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    (cached / "blobs").mkdir()
    folder.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cached / "blobs" / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    load_carryon(snapshot)
    (snapshot / CARD).unlink()
    (tmp_path / "card").write_bytes((cached / "blobs" / "1").read_bytes())
    (snapshot / CARD).symlink_to(tmp_path / "card")
    assert_refused(snapshot)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weight: weight.int(), "expected floating point"),
        (lambda weight: torch.full_like(weight, float("nan")), "expected finite values"),
        (lambda weight: torch.full_like(weight, float("inf")), "expected finite values"),
        (lambda weight: weight.T.contiguous(), "expected .*, got"),
        (lambda weight: weight[:1].clone(), "expected .*, got"),
    ],
)
def test_signed_weights_of_another_dtype_or_shape_or_not_finite_are_refused(
    folder: Path, change: Callable[[Tensor], Tensor], text: str
) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"up.weight": change(weights["up.weight"])}, folder / WEIGHTS)
    resign(folder)
    with pytest.raises(InputError, match=text):
        load_carryon(folder)
    assert_refused(folder)


def test_a_missing_or_unknown_tensor_is_refused(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"more": torch.zeros(1)}, folder / WEIGHTS)
    resign(folder)
    assert "weights: more: expected nothing" in assert_refused(folder)
    del weights["up.weight"]
    save_file(weights, folder / WEIGHTS)
    resign(folder)
    assert "weights: up.weight: expected (16, 8), got nothing" in assert_refused(folder)


def test_a_carryon_from_before_digests_loads_and_is_signed_with_its_next_alpha(
    folder: Path,
) -> None:
    values = json.loads((folder / CARD).read_text())
    del values["files"], values["sha256"]
    (folder / CARD).write_text(json.dumps(values))
    load_carryon(locate_carryon(folder))

    write_alpha(folder, 0.5)

    assert load_carryon(folder)[1].alpha == 0.5
    (folder / CARD).write_text((folder / CARD).read_text().replace("0.5", "0.6"))
    assert_refused(folder)


def test_a_new_alpha_does_not_sign_damaged_weights(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="the file was changed"):
        write_alpha(folder, 0.5)
    assert_refused(folder)


@pytest.mark.parametrize("sizes", [{"width": 65536, "heads": 8}, {"blocks": 1024, "width": 8192}])
def test_a_module_larger_than_the_memory_of_the_machine_is_refused_before_it_is_built(
    sizes: dict[str, int],
) -> None:
    shape = {"width": 65536, "blocks": 1024, "intermediate_size": 262144} | sizes
    settings = CarryOnSettings(**shape)
    start = time.perf_counter()
    with pytest.raises(InputError, match="fit the memory of this machine.*Fix: lower --blocks"):
        make_carryon(settings, base_width=16, blocks=lambda: pytest.fail("they are not needed"))
    assert time.perf_counter() - start < 1
