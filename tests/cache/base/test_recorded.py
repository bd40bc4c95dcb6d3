"""No code of a base runs, and a base that a file names is used only if it has the digests."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_bases import make_tiny_base

from carryon.cache.base.loading import read_config, read_tokenizer
from carryon.cache.base.model import load_base
from carryon.cache.base.recorded import load_recorded_base
from carryon.cache.base.source.location import locate_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.settings import ForwardSettings

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that a test may change."""
    return make_tiny_base(tmp_path / "base")


def _edit(path: Path, **changes: Any) -> None:  # noqa: ANN401
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _as_pickle(folder: Path) -> None:
    [path] = folder.glob("*.safetensors")
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_of_a_base_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    canary = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    _edit(folder / "config.json", model_type=model_type, auto_map=auto_map)
    tokenizer = {"AutoTokenizer": ["own.Tokenizer", None]}
    _edit(folder / "tokenizer_config.json", auto_map=tokenizer)
    source = str(folder)
    reads: list[Callable[[], object]] = [
        lambda: load_base(source, forward=FORWARD),
        lambda: read_tokenizer(locate_base(source)),
        lambda: read_config(locate_base(source)),
    ]
    errors = []
    for read in reads:
        try:
            read()
        except InputError as error:
            errors.append(str(error))
    assert bool(errors) == (model_type == "own")
    assert not any("\n" in error for error in errors)
    assert all("code of its own, which is not run. Fix:" in error for error in errors[:1])
    assert not canary.exists()


def test_an_attention_kernel_in_a_config_is_refused(folder: Path) -> None:
    _edit(folder / "config.json", _attn_implementation="org/kernel")
    with pytest.raises(InputError, match="expected a config without an attention kernel"):
        load_base(str(folder), forward=FORWARD)


def test_pickled_weights_are_read_only_where_that_is_allowed(folder: Path) -> None:
    before = load_base(str(folder), forward=FORWARD).identity
    _as_pickle(folder)
    with pytest.raises(InputError, match="expected weights in safetensors.*--allow-pickle"):
        load_base(str(folder), forward=FORWARD)
    allowed = ForwardSettings(device="cpu", compute_dtype="float32", allow_pickle=True)
    assert load_base(str(folder), forward=allowed).identity == before


def _other_config(folder: Path) -> None:
    _edit(folder / "config.json", rms_norm_eps=1e-3)


def _other_tokenizer(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_other_config, "config"),
        (_other_tokenizer, "tokenizer"),
        (_other_template, "chat template"),
    ],
)
def test_another_base_at_a_recorded_name_is_refused_before_its_weights_are_read(
    folder: Path, change: Callable[[Path], None], what: str
) -> None:
    recorded = load_base(str(folder), forward=FORWARD).identity.to_dict()
    assert load_recorded_base(recorded, where="store", forward=FORWARD)
    change(folder)
    [weights] = folder.glob("*.safetensors")
    weights.write_bytes(b"not read")
    with pytest.raises(SettingMismatchError, match=f"expected the recorded {what} .* --base"):
        load_recorded_base(recorded, where="store", forward=FORWARD)


def test_other_weights_at_a_recorded_name_are_refused(folder: Path, tmp_path: Path) -> None:
    recorded = load_base(str(folder), forward=FORWARD).identity.to_dict()
    make_tiny_base(folder, seed=1)
    with pytest.raises(SettingMismatchError, match="expected the recorded weights .* --base"):
        load_recorded_base(recorded, where="store", forward=FORWARD)


@pytest.mark.parametrize("key", ["weights_sha256", "tokenizer_sha256", "config_sha256"])
def test_a_file_without_digests_names_no_base(folder: Path, key: str) -> None:
    recorded = load_base(str(folder), forward=FORWARD).identity.to_dict()
    for value in (None, 3):
        with pytest.raises(InputError, match=f"expected the {key} of its base.*--base"):
            load_recorded_base(recorded | {key: value}, where="store", forward=FORWARD)
    with pytest.raises(InputError, match="expected the name of its base, got 3"):
        load_recorded_base(recorded | {"id": 3}, where="store", forward=FORWARD)


def test_which_base_a_file_names_is_logged_in_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = load_base(str(folder), forward=FORWARD).identity.to_dict()
    with caplog.at_level(logging.INFO, logger="carryon"):
        load_recorded_base(recorded, where="run/carryon", forward=FORWARD)
    assert caplog.messages == [f"base {folder}: named by run/carryon, on this disk"]
