"""Code that comes with a base runs only by the user's choice, and only the recorded code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_stores import write_corpus

from carryon.cache.base.facts import read_facts
from carryon.cache.base.model import load_base
from carryon.cache.base.recorded import load_recorded_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32")
TRUSTED = ForwardSettings(device="cpu", compute_dtype="float32", trust_remote_code=True)
CODE = """from transformers import LlamaConfig, LlamaForCausalLM
with open({canary!r}, "a") as file:
    file.write("ran\\n")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def folder(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with a model of its own."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    folder = make_tiny_base(tmp_path / f"own_{tmp_path.name.replace('-', '_')}")
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    edit(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    return folder


def edit(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_code_runs_only_where_the_user_says_so(folder: Path, canary: Path) -> None:
    with pytest.raises(InputError, match="which is not run. Fix: .*--trust-remote-code"):
        load_base(str(folder), forward=FORWARD)
    with pytest.raises(InputError, match="which is not run"):
        read_facts(str(folder))
    assert not canary.exists()
    base = load_base(str(folder), forward=TRUSTED)
    assert canary.exists()
    assert base.identity.code_sha256 is not None
    assert type(base.model).__name__ == "OwnModel"


def test_other_code_than_the_recorded_one_is_not_run(folder: Path, canary: Path) -> None:
    recorded = load_base(str(folder), forward=TRUSTED).identity.to_dict()
    again = load_recorded_base(recorded, where="store", forward=TRUSTED)
    assert again.identity.to_dict() == recorded
    with pytest.raises(InputError, match="expected leave to run the code.*--trust-remote-code"):
        load_recorded_base(recorded, where="store", forward=FORWARD)
    canary.unlink()
    with (folder / "own.py").open("a") as file:
        file.write("pass\n")
    with pytest.raises(SettingMismatchError, match="expected the recorded code .*not run"):
        load_recorded_base(recorded, where="store", forward=TRUSTED)
    assert not canary.exists()
    unknown = {key: value for key, value in recorded.items() if key != "code_sha256"}
    with pytest.raises(SettingMismatchError, match="leave out --trust-remote-code"):
        load_recorded_base(unknown, where="store", forward=TRUSTED)
    assert not canary.exists()


def test_code_of_another_repository_is_refused(folder: Path, canary: Path) -> None:
    edit(folder, auto_map={"AutoConfig": "someone/else--own.OwnConfig"})
    with pytest.raises(InputError, match="expected code of its own repository"):
        load_base(str(folder), forward=TRUSTED)
    with pytest.raises(InputError, match="expected code of its own repository"):
        read_facts(str(folder), trusts_code=True)
    assert not canary.exists()


@pytest.mark.parametrize("where", ["sub/own", "../own", "/{parent}/own"])
def test_code_that_is_not_beside_the_config_is_refused(
    folder: Path, canary: Path, where: str
) -> None:
    module = where.format(parent=folder.parent)
    path = (folder / f"{module}.py").resolve()
    path.parent.mkdir(exist_ok=True)
    (folder / "own.py").rename(path)
    edit(folder, auto_map={"AutoConfig": f"{module}.OwnConfig"})
    with pytest.raises(InputError, match="beside the config, got "):
        load_base(str(folder), forward=TRUSTED)
    assert not canary.exists()


def test_code_that_another_config_names_is_refused(folder: Path, canary: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    edit(folder, model_type="llama", auto_map={}, configuration_files=["config.4.0.0.json"])
    with pytest.raises(InputError, match="got a config that names other configs"):
        load_base(str(folder), forward=TRUSTED)
    assert not canary.exists()


@pytest.mark.usefixtures("folder")  # where modules are cached
def test_code_that_generates_counts_too(tmp_path: Path, canary: Path) -> None:
    plain = make_tiny_base(tmp_path / "generates")
    code = plain / "custom_generate" / "generate.py"
    code.parent.mkdir()
    code.write_text(f"open({str(canary)!r}, 'a').close()\ndef generate(model): pass\n")
    recorded = load_base(str(plain), forward=TRUSTED).identity.to_dict()
    assert canary.exists()
    assert len(recorded["code_sha256"]) == 64
    canary.unlink()
    with code.open("a") as file:
        file.write("pass\n")
    with pytest.raises(SettingMismatchError, match="expected the recorded code .*not run"):
        load_recorded_base(recorded, where="store", forward=TRUSTED)
    assert not canary.exists()


def test_a_loop_of_links_is_refused(folder: Path, canary: Path) -> None:
    (folder / "loop.py").symlink_to("loop.py")
    with pytest.raises(InputError, match="loop"):
        load_base(str(folder), forward=TRUSTED)
    assert not canary.exists()


def test_a_base_without_code_is_the_same_base_where_code_may_run(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "base")
    (folder / "unused.py").write_text("raise SystemExit\n")
    plain = load_base(str(folder), forward=FORWARD)
    assert load_base(str(folder), forward=TRUSTED).identity == plain.identity


def test_a_store_records_the_code_and_is_not_resumed_with_other_code(
    folder: Path, tmp_path: Path
) -> None:
    data = [str(write_corpus(tmp_path / "corpus.jsonl", num_samples=6))]
    out = tmp_path / "store"
    extract(base=str(folder), data=data, out=out, forward=TRUSTED)
    recorded = Store.open(out).manifest.base["code_sha256"]
    assert len(str(recorded)) == 64
    shutil.copytree(folder, tmp_path / "other")
    with (tmp_path / "other" / "own.py").open("a") as file:
        file.write("pass\n")
    with pytest.raises(SettingMismatchError, match="base.code_sha256: expected"):
        extract(base=str(tmp_path / "other"), data=data, out=out, forward=TRUSTED)
