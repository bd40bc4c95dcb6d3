"""Loading bases: their identity, their parts, and the bases that are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_bases import (
    FAMILIES,
    VOCAB_SIZE,
    make_tiny_base,
    make_tiny_tokenizer,
    write_tiny_gguf,
)
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from carryon.cache.base.architecture import get_architecture, read_norm
from carryon.cache.base.facts import check_token_id, read_facts
from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.identity import BaseIdentity, digest_tokenizer, digest_weights
from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.base.source.location import locate_base
from carryon.cache.errors import InputError, MissingError
from carryon.cache.settings import ForwardSettings

FLOAT32 = ForwardSettings(device="cpu", compute_dtype="float32")


def test_identity_describes_the_base(tiny_base: Base, tiny_base_folder: Path) -> None:
    identity = tiny_base.identity
    assert identity.id == str(tiny_base_folder)
    assert identity.revision is None
    assert identity.architecture == "LlamaForCausalLM"
    assert (identity.num_layers, identity.width, identity.vocab_size) == (2, 16, VOCAB_SIZE)
    assert identity.context_tokens == 128
    assert tiny_base.attention == "sdpa"
    assert tiny_base.checkpoint_dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in tiny_base.model.parameters())
    assert not tiny_base.model.training


def test_identity_survives_json(tiny_base: Base) -> None:
    values = json.loads(json.dumps(tiny_base.identity.to_dict()))
    assert BaseIdentity(**values) == tiny_base.identity


@pytest.mark.parametrize("checkpoint_dtype", [torch.bfloat16, torch.float32])
def test_weights_digest_does_not_depend_on_the_compute_dtype(
    tmp_path: Path, checkpoint_dtype: torch.dtype
) -> None:
    make_tiny_base(tmp_path, dtype=checkpoint_dtype)
    digests = set()
    for name in ("float32", "bfloat16"):
        forward = ForwardSettings(device="cpu", compute_dtype=name)
        base = load_base(str(tmp_path), forward=forward)
        assert base.model.dtype == getattr(torch, name)
        digests.add(base.identity.weights_sha256)
    assert len(digests) == 1


def test_one_changed_weight_changes_the_digest(tiny_base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    before = digest_weights(model)
    assert digest_weights(model) == before
    with torch.no_grad():
        model.model.norm.weight[3] *= -1
    assert digest_weights(model) != before


def test_tokenizer_digest_ignores_the_padding_of_a_call() -> None:
    tokenizer = make_tiny_tokenizer()
    before = digest_tokenizer(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert digest_tokenizer(tokenizer) == before
    tokenizer.add_tokens(["new"])
    assert digest_tokenizer(tokenizer) != before


def test_a_tokenizer_with_huge_ids_is_refused(tmp_path: Path, tiny_base_folder: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["the"] = 4_294_967_290
    (folder / "tokenizer.json").write_text(json.dumps(document))

    with pytest.raises(InputError, match=r"token ids up to 16,777,216, got 4,294,967,290"):
        load_base(str(folder), forward=ForwardSettings())


@pytest.mark.parametrize("value", ["layer.2", {}, [1]])
def test_a_length_that_is_no_number_is_refused(
    tmp_path: Path, tiny_base_folder: Path, value: object
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    document = json.loads((folder / "tokenizer_config.json").read_text())
    document["model_max_length"] = value
    (folder / "tokenizer_config.json").write_text(json.dumps(document))

    with pytest.raises(InputError, match="model_max_length: expected a number|cannot be read"):
        load_base(str(folder), forward=ForwardSettings())


def test_float32_widens_the_checkpoints_own_values(tiny_base: Base, tiny_base_folder: Path) -> None:
    saved = load_file(tiny_base_folder / "model.safetensors")["model.embed_tokens.weight"]
    assert saved.dtype == torch.bfloat16
    assert torch.equal(tiny_base.architecture.head.weight, saved.float())
    assert read_head(tiny_base).weight.dtype == np.uint16


def test_auto_computes_in_bfloat16_only_where_it_is_native(tiny_base_folder: Path) -> None:
    features = torch.cpu.get_capabilities()
    is_native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    base = load_base(str(tiny_base_folder), forward=ForwardSettings(device="cpu"))
    # Where it is native the faster one is taken: of a tiny block that may be either.
    assert base.compute_dtype in (
        (torch.bfloat16, torch.float32) if is_native else (torch.float32,)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_head_of_every_family_gives_the_bases_logits(
    tmp_path: Path, family: str, compute_dtype: str
) -> None:
    make_tiny_base(tmp_path, family)
    forward = ForwardSettings(device="cpu", compute_dtype=compute_dtype)
    base = load_base(str(tmp_path), forward=forward)
    head = read_head(base)
    tokens = torch.randint(0, VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = base_logits(base, tokens)[0].float().numpy()
    states = capture(base, ["final"], tokens)["final"][0].float().numpy()
    columns = np.tile(np.arange(VOCAB_SIZE, dtype=np.int32), (9, 1))
    difference = np.abs(head.logits(states, columns) - expected).max()
    assert difference < (1e-5 if compute_dtype == "float32" else 2**-7) * np.abs(expected).max()


def test_special_heads_are_carried(tmp_path: Path) -> None:
    heads = {}
    for family in ("gemma2", "cohere", "granite", "phi", "gpt2"):
        make_tiny_base(tmp_path / family, family)
        heads[family] = read_head(load_base(str(tmp_path / family), forward=FLOAT32))
    assert heads["gemma2"].softcap == 2.0
    assert heads["gemma2"].norm.weight_offset == 1.0
    assert heads["cohere"].logit_scale == heads["granite"].logit_scale == 0.25
    assert heads["cohere"].norm.kind == "layer"
    assert heads["cohere"].norm.bias is None
    assert heads["phi"].bias is not None
    assert heads["gpt2"].norm.bias is not None


def test_float32_checkpoint_keeps_a_float32_head(tmp_path: Path) -> None:
    make_tiny_base(tmp_path, "llama-untied", dtype=torch.float32)
    base = load_base(str(tmp_path), forward=FLOAT32)
    weight = read_head(base).weight
    assert weight.dtype == np.float32
    assert np.array_equal(widen(weight), base.architecture.head.weight.numpy())


def test_unknown_final_norm_is_refused() -> None:
    class Halving(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states / 2

    with pytest.raises(InputError, match="neither an RMS norm nor a layer norm"):
        read_norm(Halving(), width=16)


def test_model_that_changes_its_logits_is_refused(tiny_base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    original = model.forward

    def forward(**inputs: object) -> object:
        output = original(**inputs)
        output.logits = output.logits + 1
        return output

    model.forward = forward
    with pytest.raises(InputError, match="between the hidden state and the logits"):
        get_architecture(model)


def test_model_that_looks_ahead_is_refused(tiny_base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
    for block in model.model.layers:
        block.self_attn.is_causal = False
    with pytest.raises(InputError, match="changes with the tokens after it"):
        get_architecture(model)


def test_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=VOCAB_SIZE,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="BertLMHeadModel: .* cannot be a base yet"):
        load_base(str(tmp_path), forward=FLOAT32)


def test_incomplete_checkpoint_is_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 are not in the checkpoint.*layers\.1\.mlp\.up_proj"):
        load_base(str(folder), forward=FLOAT32)


def test_missing_bases_are_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "nothing"), "./nothing", "nothing.gguf", "a/b/c"):
        with pytest.raises(MissingError, match="no such folder or file"):
            locate_base(source)
    with pytest.raises(InputError, match=r"has no config\.json"):
        locate_base(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected a folder or a \.gguf file"):
        locate_base(str(tmp_path / "weights.bin"))


def test_folder_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    make_tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a causal LM that transformers"):
        load_base(str(tmp_path), forward=FLOAT32)


def test_gguf_file_is_a_base(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    base = load_base(str(path), forward=FLOAT32)
    assert base.identity.id == str(path)
    assert (base.identity.num_layers, base.identity.width) == (1, 32)
    assert base.tokenizer.decode(base.tokenizer("the an").input_ids) == "the an"
    assert read_head(base).weight.dtype == np.uint16
    saved = tmp_path / "saved"
    base.model.to(torch.bfloat16).save_pretrained(saved)
    base.tokenizer.save_pretrained(saved)
    again = load_base(str(saved), forward=FLOAT32)
    assert again.identity.weights_sha256 == base.identity.weights_sha256
    assert again.identity.tokenizer_sha256 == base.identity.tokenizer_sha256


def test_unknown_device_is_refused(tiny_base_folder: Path) -> None:
    for device in ("gpu9", "cuda:99"):
        with pytest.raises(
            InputError, match=f"device: expected one of this machine, got '{device}'"
        ):
            load_base(str(tiny_base_folder), forward=ForwardSettings(device=device))


def test_loading_a_local_base_is_silent(
    tiny_base_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load_base(str(tiny_base_folder), forward=FLOAT32)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_base_with_nan_in_a_weight_is_refused_by_the_name_of_the_weight(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(InputError, match=f"expected finite weights, got NaN .* in {name}") as error:
        load_base(str(folder), forward=ForwardSettings(device="cpu"))

    assert "architecture" not in str(error.value)


HOSTILE_FILES = {
    "a number for a token": ("tokenizer_config.json", b'{"bos_token": 3}'),
    "lists": ("config.json", b"[" * 100_000),
    "no tokenizer": ("tokenizer.json", b'{"model": 1, "added_tokens": []}'),
    "no tensors": ("model.safetensors", b"\xff" * 40),
    "short": ("model.safetensors", b""),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_base_with_any_file_changed_is_one_line(
    tiny_base_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    path, content = HOSTILE_FILES[name]
    (folder / path).write_bytes(content)
    with pytest.raises(InputError, match="could not be loaded") as raised:
        load_base(str(folder), forward=ForwardSettings(device="cpu"))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "large"])
def test_a_base_that_would_be_read_for_ever_is_refused(
    tiny_base_folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = Path(shutil.copytree(tiny_base_folder, tmp_path / "base")) / name
    path.unlink()
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match="expected|could not be loaded"):
        load_base(str(path.parent), forward=ForwardSettings(device="cpu"))


@pytest.mark.parametrize("value", [1 << 70, -1, "x", 1.5])
def test_no_token_id_in_a_generation_config_is_one_line(
    tiny_base_folder: Path, tmp_path: Path, value: object
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError) as raised:
        read_facts(str(folder))
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(InputError, match="pad_token_id: expected a token id"):
        check_token_id("pad_token_id", value)
