"""A base spread over devices gives the bits and digests of the plain one."""

import gc
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_bases import make_tiny_base

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.errors import InputError, MissingError
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.top_blocks import read_blocks

TAPS = ["layer.0", "layer.1", "prenorm", "final"]
IDS = torch.arange(24).reshape(2, 12)
PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
PARTS = (*PARTS, "model.norm", "lm_head")


def spread(path: Path, *, disk: tuple[str, ...]) -> str:
    """A device map of the tiny Llama with some parts on disk."""
    places = {part: "disk" if part in disk else "cpu" for part in PARTS}
    path.write_text(json.dumps(places))
    return str(path)


def load(folder: Path, **settings: Any) -> Base:  # noqa: ANN401
    return load_base(str(folder), forward=ForwardSettings(**settings))


def check_same(base: Base, plain: Base) -> None:
    """Compare identity, states, logits, head and blocks, bit for bit."""
    assert base.identity == plain.identity
    states, expected = capture(base, TAPS, IDS), capture(plain, TAPS, IDS)
    for tap in TAPS:
        assert torch.equal(states[tap], expected[tap]), tap
    assert torch.equal(base_logits(base, IDS), base_logits(plain, IDS))
    head, own = read_head(base), read_head(plain)
    assert np.array_equal(head.weight, own.weight)
    assert np.array_equal(head.norm.weight, own.norm.weight)
    blocks, kept = read_blocks(base, 1), read_blocks(plain, 1)
    for got, known in zip([blocks.norm, *blocks.blocks], [kept.norm, *kept.blocks], strict=True):
        assert got.keys() == known.keys()
        assert all(torch.equal(got[name], known[name]) for name in known)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "disk",
    [
        ("model.layers.1",),
        ("model.layers.0", "model.norm"),
        ("model.embed_tokens", "lm_head", "model.layers.1"),
        PARTS,
    ],
)
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_base_on_cpu_and_disk_gives_the_bits_of_the_plain_one(
    disk: tuple[str, ...], compute_dtype: str, is_tied: bool, tmp_path: Path
) -> None:
    folder = make_tiny_base(tmp_path / "base", tie_word_embeddings=is_tied)
    plain = load(folder, device="cpu", compute_dtype=compute_dtype)
    places = spread(tmp_path / "map.json", disk=disk)
    base = load(folder, device_map=places, compute_dtype=compute_dtype)
    assert base.device.type == "cpu"
    assert hasattr(base.model, "_hf_hook")  # it is spread
    check_same(base, plain)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma2"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_other_families_all_on_disk(family: str, saved: torch.dtype, tmp_path: Path) -> None:
    """Of a mixture of experts transformers writes joined matrices to the offload folder."""
    folder = make_tiny_base(tmp_path / "base", family, dtype=saved)
    (tmp_path / "map.json").write_text('{"": "disk"}')
    (tmp_path / "kept").mkdir()
    for compute_dtype in ("float32", "bfloat16"):
        plain = load(folder, device="cpu", compute_dtype=compute_dtype)
        base = load(
            folder,
            device_map=str(tmp_path / "map.json"),
            offload_folder=str(tmp_path / "kept"),
            compute_dtype=compute_dtype,
        )
        assert base.identity == plain.identity
        assert torch.equal(
            capture(base, ["final"], IDS)["final"], capture(plain, ["final"], IDS)["final"]
        )
        written = list((tmp_path / "kept").rglob("*.safetensors"))
        assert bool(written) == (family == "mixtral")
        del base
        gc.collect()
        assert not any((tmp_path / "kept").iterdir())


def test_joined_matrices_on_disk_are_not_replaced_by_those_read_for_the_digest(
    tmp_path: Path,
) -> None:
    folder = make_tiny_base(tmp_path / "base", "mixtral", dtype=torch.float32)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    plain = load(folder, device="cpu", compute_dtype="float32")
    places = tmp_path / "map.json"
    places.write_text('{"": "disk"}')
    parent = tmp_path / "offload"
    parent.mkdir()
    base = load(folder, device_map=str(places), offload_folder=str(parent), compute_dtype="float32")
    assert torch.equal(base_logits(base, IDS), base_logits(plain, IDS))
    assert base.identity == plain.identity
    [made] = parent.iterdir()
    assert not [each for each in made.iterdir() if each.is_dir()]


@pytest.mark.parametrize("way", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_what_does_not_fit_max_memory_is_read_from_disk(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("an accelerator takes all of a tiny base")
    folder = make_tiny_base(tmp_path / "base", num_hidden_layers=4)
    plain = load(folder, device="cpu", compute_dtype="float32")
    with caplog.at_level(logging.INFO, logger="carryon"):
        base = load(folder, device_map=way, max_memory=["cpu=45kB"], compute_dtype="float32")
    [line] = caplog.messages
    assert "weights:" in line
    assert "on disk" in line
    assert any(weight.is_meta for weight in base.model.parameters())
    check_same(base, plain)
    whole = load(folder, device_map=way, compute_dtype="float32")
    assert not any(weight.is_meta for weight in whole.model.parameters())
    assert whole.identity == plain.identity


def test_a_weight_that_differs_in_the_file_changes_the_digest(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    (tmp_path / "map.json").write_text('{"": "disk"}')
    before = load(folder, device_map=str(tmp_path / "map.json"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    after = load(folder, device_map=str(tmp_path / "map.json"))
    assert after.identity.weights_sha256 != before.identity.weights_sha256
    assert after.identity == load(folder, device="cpu").identity


def test_an_offload_folder_is_removed_after_an_error(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", "mixtral")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "map.json").write_text('{"": "disk"}')
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(InputError):
        load(folder, device_map=str(tmp_path / "map.json"), offload_folder=str(kept))
    assert not any(kept.iterdir())


def test_tied_weights_in_two_places_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", tie_word_embeddings=True)
    places = spread(tmp_path / "map.json", disk=("lm_head",))
    with pytest.raises(InputError, match=r"tied weights in one place.*lm_head.*Fix:") as raised:
        load(folder, device_map=places)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "expected a JSON file"),
        ("[1]", "expected an object"),
        ("{}", "expected an object"),
        ('{"": 1.5}', "expected devices such as"),
        ('{"": true}', "expected devices such as"),
        ('{"": null}', "expected devices such as"),
        ('{"": "gpu"}', "expected one of this machine, got 'gpu'"),
        ('{"": 77}', "expected one of this machine, got '.*:77'"),
        ('{"model.layers.0": "disk"}', "could not be loaded: "),
    ],
)
def test_no_device_map_is_one_line(text: str, match: str, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(InputError, match=match) as raised:
        load(folder, device_map=str(tmp_path / "map.json"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "size", ["cpu", "cpu=", "cpu=70", "cpu=70 XB", "disk=3GB", "9=1GB", "-1=1GB", "cpu=1IB"]
)
def test_no_size_is_one_line(size: str, tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    with pytest.raises(InputError, match="--max-memory: expected ") as raised:
        load(folder, device_map="auto", max_memory=[size])
    assert "\n" not in str(raised.value)


def test_options_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_memory: .* Fix: --device-map auto"):
        ForwardSettings(max_memory=["cpu=1GB"])
    with pytest.raises(InputError, match="offload_folder: .* Fix: --device-map auto"):
        ForwardSettings(offload_folder="x")
    with pytest.raises(InputError, match="device: .* Fix: leave out --device"):
        ForwardSettings(device="cpu", device_map="auto")
    with pytest.raises(MissingError, match="expected auto, balanced"):
        load(make_tiny_base(tmp_path / "base"), device_map="blanced")
