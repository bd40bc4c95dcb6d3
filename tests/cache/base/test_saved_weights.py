"""Digests of a base's weights without a second copy of them, against a plain one."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_bases import FAMILIES, make_tiny_base
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from carryon.cache.base.identity import digest_weights
from carryon.cache.base.loading import read_model
from carryon.cache.base.model import load_base
from carryon.cache.base.source.location import locate_base
from carryon.cache.base.weights.saved import digest_checkpoint
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")


def read(folder: Path, dtype: torch.dtype) -> nn.Module:
    place = locate_base(str(folder))
    return read_model(place, dtype=dtype, device=CPU, attention="sdpa")


def plain_digest(model: nn.Module) -> str:
    """As stores record it: of the weights in the dtype of their checkpoint, whole."""
    named: dict[tuple[int, torch.Size], tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        named.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor))
    lines = []
    for name, tensor in named.values():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        shape = tuple(tensor.shape)
        lines.append(f"{name} {shape} {tensor.dtype} {hashlib.sha256(data).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saved", DTYPES)
def test_a_base_has_one_digest_in_every_compute_dtype(
    family: str, saved: str, tmp_path: Path
) -> None:
    folder = make_tiny_base(tmp_path / "base", family, dtype=DTYPES[saved])
    expected = plain_digest(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[saved]))
    for name in DTYPES:
        base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype=name))
        assert base.identity.weights_sha256 == expected, name
        assert base.checkpoint_dtype == DTYPES[saved]
        assert base.model.dtype == DTYPES[name]


def rewritten(folder: Path, weights: dict[str, torch.Tensor], *, dtype: str) -> Path:
    """Give a base other weights, and a config that says they are of some dtype."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    return folder


@pytest.mark.parametrize("said", ["bfloat16", "float16"])
def test_files_of_wider_values_than_the_config_says_are_computed_as_they_are(
    said: str, tmp_path: Path
) -> None:
    """And have the digest of the rounded values, in every compute dtype: as stores record it."""
    folder = make_tiny_base(tmp_path / "base", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    rewritten(folder, weights, dtype=said)
    expected = plain_digest(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[said]))
    for name, dtype in DTYPES.items():
        base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype=name))
        assert base.identity.weights_sha256 == expected, name
        loaded = base.model.state_dict()
        assert all(torch.equal(loaded[key], each.to(dtype)) for key, each in weights.items())


@pytest.mark.parametrize("saved", ["bfloat16", "float16"])
def test_a_weight_that_is_always_float32_is_digested_so(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As A_log of OLMo Hybrid, which has no rule for it, and as a buffer may be."""

    def init(model: LlamaForCausalLM, config: LlamaConfig) -> None:
        plain(model, config)
        model.log = nn.Parameter(torch.zeros(3, dtype=torch.float32))
        model.register_buffer("bias", torch.zeros(3, dtype=torch.float32))

    plain = LlamaForCausalLM.__init__
    folder = make_tiny_base(tmp_path / "base", dtype=DTYPES[saved])
    monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    more = {"log": torch.ones(3), "bias": torch.tensor([0.5, 2.0, 1.0])}  # exact in any dtype
    rewritten(folder, load_file(folder / "model.safetensors") | more, dtype=saved)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[saved])
    assert model.log.dtype == model.bias.dtype == torch.float32
    for name in DTYPES:
        base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype=name))
        assert base.identity.weights_sha256 == plain_digest(model), name


@pytest.mark.parametrize("saved", ["bfloat16", "float16"])
def test_a_nan_in_a_row_that_is_not_read_keeps_its_bits_in_the_digest(
    saved: str, tmp_path: Path
) -> None:
    folder = make_tiny_base(tmp_path / "base", "llama-untied", dtype=DTYPES[saved])
    weights = load_file(folder / "model.safetensors")
    bits = weights["model.embed_tokens.weight"].view(torch.int16)
    bits[-1, 0] = 0x7F81 if saved == "bfloat16" else 0x7C01
    rewritten(folder, weights, dtype=saved)
    expected = plain_digest(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[saved]))
    for name in DTYPES:
        base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype=name))
        assert base.identity.weights_sha256 == expected, name


def test_pieces_of_a_weight_are_digested_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_base(tmp_path / "base", dtype=torch.float32)
    expected = plain_digest(read(folder, torch.float32))
    monkeypatch.setattr("carryon.cache.base.identity.PIECE_ITEMS", 37)
    assert digest_weights(read(folder, torch.float32)) == expected
    narrow = read(folder, torch.bfloat16)
    assert digest_checkpoint(narrow, locate_base(str(folder)), dtype=torch.float32) == expected


def test_only_a_checkpoint_with_the_loaded_weights_is_digested(tmp_path: Path) -> None:
    """Of a mixture of experts, and of a file with another weight, the files do not tell."""
    experts = make_tiny_base(tmp_path / "experts", "mixtral", dtype=torch.float32)
    model = read(experts, torch.bfloat16)
    assert digest_checkpoint(model, locate_base(str(experts)), dtype=torch.float32) is None

    folder = make_tiny_base(tmp_path / "base", dtype=torch.float32)
    model = read(folder, torch.bfloat16)
    place = locate_base(str(folder))
    assert digest_checkpoint(model, place, dtype=torch.float32) is not None
    with torch.no_grad():
        next(model.parameters())[3] *= -1
    assert digest_checkpoint(model, place, dtype=torch.float32) is None


def test_a_checkpoint_in_several_files_has_the_same_digest(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base", dtype=torch.float32)
    expected = plain_digest(read(folder, torch.float32))
    whole = load_file(folder / "model.safetensors")
    parts = {f"part-{number}.safetensors": sorted(whole)[number::2] for number in range(2)}
    for name, keys in parts.items():
        save_file({key: whole[key] for key in keys}, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    narrow = read(folder, torch.bfloat16)
    assert digest_checkpoint(narrow, locate_base(str(folder)), dtype=torch.float32) == expected


def quantized(folder: Path, facts: dict[str, object]) -> str:
    """A tiny base whose config says that it is quantized."""
    make_tiny_base(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return str(folder)


@pytest.mark.parametrize(
    ("package", "facts"),
    [
        ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
        ("optimum", {"quant_method": "gptq", "bits": 4}),
        ("gptqmodel", {"quant_method": "awq", "bits": 4}),
        ("compressed-tensors", {"quant_method": "compressed-tensors"}),
    ],
)
def test_a_quantized_checkpoint_that_cannot_run_gives_the_reason_of_transformers(
    package: str, facts: dict[str, object], tmp_path: Path
) -> None:
    if find_spec(package.replace("-", "_")) is not None:
        pytest.skip(f"{package} is installed")
    base = quantized(tmp_path / "base", facts)
    with pytest.raises(InputError, match=f"its model could not be loaded: .*{package}") as raised:
        load_base(base, forward=ForwardSettings(device="cpu"))
    assert "\n" not in str(raised.value)


def test_a_quantized_checkpoint_of_another_dtype_is_refused(tmp_path: Path) -> None:
    """transformers unpacks FP8 to bfloat16, also where float32 is wanted."""
    if torch.accelerator.is_available():
        pytest.skip("an accelerator may keep FP8 as it is")
    base = quantized(tmp_path / "base", {"quant_method": "fp8"})
    with pytest.raises(InputError, match="Fix: --compute-dtype bfloat16"):
        load_base(base, forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    loaded = load_base(base, forward=ForwardSettings(device="cpu", compute_dtype="bfloat16"))
    assert loaded.model.dtype == torch.bfloat16
