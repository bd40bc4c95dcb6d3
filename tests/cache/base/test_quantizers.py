"""Quantization on load, and checkpoints that are quantized, beside the dense base."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.base.quantizers import checkpoint_quantization
from carryon.cache.base.recorded import load_recorded_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.repair import repair
from carryon.cache.format.manifest import read_manifest
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.top_blocks import read_blocks
from carryon.tools.commands.inspect_store import describe_store, format_facts

TAPS = ["layer.1", "prenorm", "final"]
MAX_KERNEL_ERROR = {"int8": 1e-5, "fp8": 1e-5, "nf4": 0.02}
"""Against weights unpacked; a kernel for 4 bits may compute in bfloat16."""
IDS = torch.arange(24).reshape(2, 12)
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Kernels for 4 bits take widths of 32 or more."""
MAX_ERROR = {"int8": 0.05, "fp8": 0.15, "nf4": 0.6}
"""Of `final`, relative to the dense base, whose random weights are the worst case."""
METHODS = list(MAX_ERROR)

functional = pytest.importorskip("bitsandbytes.functional")
pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("quantized") / "base", **WIDE)


def load(folder: Path, **settings: Any) -> Base:  # noqa: ANN401
    settings = {"device": "cpu", "compute_dtype": "float32"} | settings
    return load_base(str(folder), forward=ForwardSettings(**settings))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_states_are_near_and_the_head_is_the_dense_one(
    method: str, compute_dtype: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = load(folder, compute_dtype=compute_dtype)
    with caplog.at_level(logging.INFO, logger="carryon"):
        base = load(folder, compute_dtype=compute_dtype, quantize=method)
    assert any(f"quantized ({method}), 14 of 14 linear layers" in line for line in caplog.messages)
    got, expected = (capture(each, ["final"], IDS)["final"].float() for each in (base, dense))
    error = float((got - expected).norm() / expected.norm())
    assert 1e-4 < error < MAX_ERROR[method]
    head, own = read_head(base), read_head(dense)
    assert np.array_equal(head.weight, own.weight)
    assert np.array_equal(head.norm.weight, own.norm.weight)


def test_each_quantization_is_a_base_of_its_own_in_every_dtype(folder: Path) -> None:
    found = {}
    for method in ("none", *METHODS):
        identities = {
            load(folder, quantize=method, compute_dtype=dtype).identity
            for dtype in ("float32", "bfloat16")
        }
        [found[method]] = identities
    assert len({each.weights_sha256 for each in found.values()}) == 4
    assert found["none"].quantization is None
    assert "quantization" not in found["none"].to_dict()
    assert [found[method].quantization for method in METHODS] == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_states_of_a_sample_do_not_depend_on_its_batch(method: str, folder: Path) -> None:
    base = load(folder, quantize=method)
    alone = capture(base, ["final"], IDS[:1])["final"]
    beside = capture(base, ["final"], torch.cat([IDS[:1], IDS[1:] * 7 % 250]))["final"][:1]
    assert float((alone - beside).norm() / alone.norm()) < 1e-5


def test_a_store_of_quantized_states_and_a_dense_one_are_never_taken_for_each_other(
    folder: Path, tmp_path: Path
) -> None:
    data = [str(write_corpus(tmp_path / "corpus.jsonl", num_samples=6))]
    forward = {
        method: ForwardSettings(device="cpu", compute_dtype="float32", quantize=method)
        for method in ("none", "int8", "nf4")
    }

    def run(method: str, out: str, **options: Any) -> Store:  # noqa: ANN401
        extract(base=str(folder), data=data, out=tmp_path / out, forward=forward[method], **options)
        return Store.open(tmp_path / out)

    dense, own = run("none", "dense"), run("int8", "int8")
    assert own.fingerprint != dense.fingerprint
    assert own.manifest.base["quantization"] == "int8"
    assert own.manifest.versions["torchao"]
    assert own.manifest.head == dense.manifest.head
    heads = [
        {p: d for p, d in each.manifest.files.items() if p.startswith("head/")}
        for each in (own, dense)
    ]
    assert heads[0] == heads[1]
    text = format_facts(describe_store(own))
    assert re.search(r"quantization +int8", text)
    assert re.search(r"quantization +none", format_facts(describe_store(dense)))

    for method, out, known in (
        ("none", "int8", "int8"),
        ("int8", "dense", "none"),
        ("nf4", "int8", "int8"),
    ):
        expected = (
            f"base.quantization: expected {known}, which the store was made with, got {method}"
        )
        with pytest.raises(SettingMismatchError, match=expected):
            run(method, out)
        with pytest.raises(SettingMismatchError, match=expected):
            run(method, out, append=True)


def test_the_base_of_a_store_is_quantized_as_the_store_records(
    folder: Path, tmp_path: Path
) -> None:
    data = [str(write_corpus(tmp_path / "corpus.jsonl", num_samples=6))]
    forward = ForwardSettings(device="cpu", compute_dtype="float32", quantize="int8")
    out = tmp_path / "store"
    extract(base=str(folder), data=data, out=out, forward=forward)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "hidden" in p.parts}
    victim = sorted(before)[-1]
    victim.write_bytes(b"damaged")
    report = repair(out, forward=ForwardSettings(device="cpu"))
    assert report.is_complete
    assert {p: p.read_bytes() for p in before} == before

    recorded = read_manifest(out).base
    base = load_recorded_base(recorded, where="store", forward=ForwardSettings(device="cpu"))
    assert base.identity.quantization == "int8"
    other = ForwardSettings(device="cpu", quantize="nf4")
    with pytest.raises(SettingMismatchError, match=r"\(int8\), got nf4.*--quantize int8"):
        load_recorded_base(recorded, where="store", forward=other)


def test_blocks_of_a_quantized_base_are_refused_by_name(folder: Path) -> None:
    base = load(folder, quantize="int8")
    with pytest.raises(InputError, match=r"expected dense blocks.*\(int8\).*--with-blocks"):
        read_blocks(base, 1)


def test_what_cannot_be_quantized_is_one_line(tmp_path: Path) -> None:
    narrow = make_tiny_base(tmp_path / "narrow")
    gpt2 = make_tiny_base(tmp_path / "gpt2", "gpt2")
    with pytest.raises(InputError, match="expected linear layers to quantize.*GPT2") as raised:
        load(gpt2, quantize="int8")
    errors = [str(raised.value)]
    try:  # only kernels of some CPUs need multiples of 32
        load(narrow, quantize="nf4", compute_dtype="bfloat16")
    except InputError as error:
        errors.append(str(error))
        assert "that run on cpu, got: " in errors[-1]
    assert not any("\n" in error for error in errors)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    facts = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    with pytest.raises(InputError, match=r"quantized \(gptq-4\). Fix: leave out --quantize"):
        load(folder, quantize="nf4")


@pytest.mark.parametrize("method", METHODS)
def test_states_are_those_of_the_rounded_weights(method: str, folder: Path) -> None:
    """A plain model in float32 with each weight unpacked."""
    base, plain = load(folder, quantize=method), load(folder)
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear) and module is not base.architecture.head:
            weight: Any = module.weight
            own = plain.model.get_submodule(name)
            assert isinstance(own, nn.Linear)
            if method == "nf4":  # a CPU may have packed those of the base in another order
                codes, state = functional.quantize_4bit(own.weight.data, quant_type="nf4")
                unpacked = functional.dequantize_4bit(codes, state)
            else:
                unpacked = weight.dequantize()
            assert not torch.equal(unpacked, own.weight)
            own.weight.copy_(unpacked)
    got, expected = (capture(each, TAPS, IDS) for each in (base, plain))
    for tap in TAPS:
        error = float((got[tap] - expected[tap]).norm() / expected[tap].norm())
        assert error < MAX_KERNEL_ERROR[method], tap


def test_8_bits_of_bitsandbytes_do_not_compute_in_float32(folder: Path, tmp_path: Path) -> None:
    wide = pack(folder, tmp_path / "wide", torch.float32, load_in_8bit=True)
    with pytest.raises(InputError, match="outliers are looked for in the whole batch.*Fix:"):
        load(wide)
    packed = pack(folder, tmp_path / "packed", torch.bfloat16, load_in_8bit=True)
    base = load(packed, compute_dtype="auto")
    assert base.compute_dtype == torch.bfloat16
    assert base.identity.quantization == "bitsandbytes-int8"
    with pytest.raises(InputError, match="Fix: --compute-dtype bfloat16"):
        load(packed, compute_dtype="float32")


def pack(folder: Path, out: Path, dtype: torch.dtype, **facts: Any) -> Path:  # noqa: ANN401
    """Save a base as a checkpoint that bitsandbytes quantized."""
    make: Any = BitsAndBytesConfig
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=make(**facts)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def test_a_checkpoint_of_bitsandbytes_runs_and_says_so(folder: Path, tmp_path: Path) -> None:
    facts = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = pack(folder, tmp_path / "packed", torch.float32, **facts)
    base, again = load(packed), load(packed)
    assert base.identity == again.identity
    assert base.identity.quantization == "bitsandbytes-nf4"
    on_load = load(folder, quantize="nf4")
    assert base.identity.weights_sha256 != on_load.identity.weights_sha256
    got, expected = (capture(each, ["final"], IDS)["final"] for each in (base, on_load))
    assert float((got - expected).norm() / expected.norm()) < MAX_KERNEL_ERROR["nf4"]
    assert np.array_equal(read_head(base).norm.weight, read_head(on_load).norm.weight)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq-4"),
        ({"quant_method": "awq", "bits": 4}, "awq-4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes-int8"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "compressed-tensors-float-quantized",
        ),
        ({"quant_method": "fp8"}, "fp8-checkpoint"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8-e4m3"),
        ({"quant_method": "\x1b[31m" + "x" * 500}, "31m" + "x" * 56),
        ({"quant_method": "gptq", "load_in_8bit": True}, "bitsandbytes-int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes-fp4"),
        ({}, "unknown"),
    ],
)
def test_a_checkpoints_quantization_has_a_short_name(facts: dict[str, Any], name: str) -> None:
    config = PreTrainedConfig()
    assert checkpoint_quantization(config) is None
    config.quantization_config = facts
    assert checkpoint_quantization(config) == name


def test_a_package_that_quantizes_fetches_no_code(tmp_path: Path) -> None:
    """bitsandbytes would, on import, from the hub, where kernels is installed and the CPU has
    bfloat16; the stand-in on every CPU."""
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    lines = ["try:", "    import kernels", "except ImportError:", "    pass"]
    (tmp_path / "eager.py").write_text("\n".join(lines))
    program = (
        "from pathlib import Path\n"
        "from carryon.cache.base.quantizers import import_quantizer\n"
        "for package in ('bitsandbytes', 'eager'):\n"
        "    import_quantizer(package, purpose='a test')\n"
        f"ran = Path({str(tmp_path / 'ran')!r})\n"
        "assert not ran.exists()\n"
        "import kernels\n"  # itself, after that
        "assert ran.exists()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
