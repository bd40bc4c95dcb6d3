"""The order of an extraction: all that data and settings can have wrong comes before the base."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import CHAT_TEMPLATE, make_tiny_base, write_tiny_gguf
from support.tiny_stores import (
    FORWARD,
    READING,
    SETTINGS,
    error_of,
    extract_tiny,
    files_below,
    repair_tiny,
    write_corpus,
)

from carryon.cache import verify
from carryon.cache.base.facts import facts_of, read_facts
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.extraction.resume import refuse_other_settings
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import shard_path
from carryon.cache.settings import CorpusSettings, DataSettings
from carryon.cache.store.reader import Store

OTHER_TEMPLATE = CHAT_TEMPLATE.replace("assistant", "model")


@pytest.fixture
def without_weights(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A base whose weights cannot be loaded."""
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def bad_data(tmp_path: Path) -> Path:
    path = tmp_path / "bad.jsonl"
    path.write_text("{not json}\n")
    return path


def plan(base: Path | str, data: Any, out: Path, **store: Any) -> Any:  # noqa: ANN401
    return plan_extraction(
        base=str(base),
        data=data,
        out=out,
        corpus=CorpusSettings(),
        store=replace(SETTINGS, **store),
        forward=FORWARD,
        data_settings=READING,
    )


def test_facts_read_without_weights_are_those_of_the_loaded_base(
    tiny_base_folder: Path, tiny_base: Base
) -> None:
    read, loaded = read_facts(str(tiny_base_folder)), facts_of(tiny_base)
    assert replace(read, tokenizer=loaded.tokenizer) == loaded
    assert read.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert read.end_tokens == (2,)
    assert read.vocab_size == tiny_base.identity.vocab_size


def test_end_tokens_of_the_generation_config_come_before_the_tokenizers(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 5]}))
    assert read_facts(str(folder)).end_tokens == (7, 2, 5)
    (folder / "generation_config.json").unlink()
    assert read_facts(str(folder)).end_tokens == (2,)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "qwen2"])
def test_facts_of_other_architectures_are_those_of_the_loaded_base(
    kind: str, tmp_path: Path
) -> None:
    folder = make_tiny_base(tmp_path / kind, kind)
    loaded = facts_of(load_base(str(folder), forward=FORWARD))
    assert replace(read_facts(str(folder)), tokenizer=loaded.tokenizer) == loaded


def test_bad_data_are_refused_before_the_base_is_loaded(
    without_weights: Path, bad_data: Path, tmp_path: Path
) -> None:
    text = error_of(lambda: plan(without_weights, bad_data, tmp_path / "store"))
    assert text.startswith(f"InputError: {bad_data}:1: ")
    good = write_corpus(tmp_path / "good.jsonl", num_samples=3)
    assert "model could not be loaded" in error_of(
        lambda: plan(without_weights, good, tmp_path / "store")
    )


def test_a_wrong_tap_unit_or_device_is_refused_before_the_data_are_read(
    without_weights: Path, bad_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    with pytest.raises(InputError, match="tap 'layer.9': this base has"):
        plan(without_weights, bad_data, out, taps=["layer.9"])
    with pytest.raises(InputError, match="unit_tokens: expected a multiple of a number near"):
        plan(without_weights, bad_data, out, unit_tokens=1_000_003)
    with pytest.raises(InputError, match="device: expected one of this machine, got 'gpu9'"):
        plan_extraction(
            base=str(without_weights),
            data=bad_data,
            out=out,
            corpus=CorpusSettings(),
            store=SETTINGS,
            forward=replace(FORWARD, device="gpu9"),
            data_settings=READING,
        )


def test_what_was_lost_is_logged_before_the_base_is_loaded(
    without_weights: Path, bad_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_corpus(tmp_path / "good.jsonl", num_samples=3)
    with caplog.at_level(logging.INFO), pytest.raises(InputError, match="could not be loaded"):
        plan_extraction(
            base=str(without_weights),
            data=[good, bad_data],
            out=tmp_path / "store",
            corpus=CorpusSettings(),
            store=SETTINGS,
            forward=FORWARD,
            data_settings=DataSettings(tokenizer_workers=1, bad_rows="skip"),
        )
    assert "records read" in caplog.text
    assert f"{bad_data}:1" in caplog.text
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage().startswith("bad row: 1 of 4 records")


def test_the_manifest_keeps_report_and_kinds(store_original: Path) -> None:
    [part] = read_manifest(store_original).parts
    assert (part.report["records"], part.report["kept"]) == (12, 12)
    assert part.kinds == {"text": 12}


@pytest.mark.parametrize("is_file", [True, False])
def test_another_chat_template_is_kept_as_text_and_hashed_with_the_base(
    is_file: bool, tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    given = OTHER_TEMPLATE
    if is_file:
        given = str(store_tmp / "chat.jinja")
        Path(given).write_text(OTHER_TEMPLATE)
    own = tiny_base.tokenizer.chat_template
    root = store_tmp / "store"
    extract_tiny(tiny_base, store_data, root, corpus=CorpusSettings(chat_template=given))
    manifest = read_manifest(root)
    assert manifest.corpus["chat_template"] == OTHER_TEMPLATE
    digest = manifest.base["chat_template_sha256"]
    assert digest != tiny_base.identity.chat_template_sha256
    assert tiny_base.tokenizer.chat_template == own, "the caller's tokenizer was changed"

    before = files_below(root)
    again = CorpusSettings(chat_template=OTHER_TEMPLATE)
    assert extract_tiny(tiny_base, store_data, root, corpus=again).computed_units == 0
    assert files_below(root) == before
    text = error_of(lambda: extract_tiny(tiny_base, store_data, root))
    assert "chat_template: expected {% for" in text
    assert "which the store was made with, got none" in text


def test_a_store_of_another_chat_template_is_repaired_with_its_base(
    tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    extract_tiny(tiny_base, store_data, root, corpus=CorpusSettings(chat_template=OTHER_TEMPLATE))
    (root / shard_path("final", 0)).unlink()
    assert repair_tiny(root, tiny_base).is_complete
    assert verify(root, depth="full").is_complete


DATED = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE
CHATS = [
    {"messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "the"}]}
]


def test_the_date_that_a_template_prints_is_kept_for_the_days_after(
    tiny_base: Base, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    first = CorpusSettings(chat_template=DATED, template_date="2020-01-31")
    extract_tiny(tiny_base, CHATS, root, corpus=first)
    store = Store.open(root)
    assert tiny_base.tokenizer.decode(store[0].tokens).startswith("31 Jan 2020 ")
    later = CorpusSettings(chat_template=DATED)  # today's would be other data
    assert extract_tiny(tiny_base, CHATS, root, corpus=later).computed_units == 0
    assert read_manifest(root).corpus["template_date"] == "2020-01-31"


def test_a_date_is_kept_only_where_the_template_prints_one(
    tiny_base: Base, store_tmp: Path, store_original: Path
) -> None:
    extract_tiny(tiny_base, CHATS, store_tmp / "store", corpus=CorpusSettings(chat_template=DATED))
    kept = read_manifest(store_tmp / "store").corpus["template_date"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept)
    assert read_manifest(store_original).corpus["template_date"] == ""


def test_a_store_from_before_has_the_defaults_of_newer_settings_and_any_date(
    store_original: Path,
) -> None:
    new = read_manifest(store_original)
    kept = {name: new.corpus[name] for name in ("mask", "max_tokens", "long")}
    old = replace(new, corpus=kept)
    dated = replace(new, corpus=new.corpus | {"template_date": "2020-01-31"})
    refuse_other_settings(old, new, name="store")
    refuse_other_settings(old, dated, name="store")
    with pytest.raises(SettingMismatchError, match="turns: expected all, .* got last"):
        refuse_other_settings(
            old, replace(new, corpus=new.corpus | {"turns": "last"}), name="store"
        )
    with pytest.raises(SettingMismatchError, match="template_date: expected none, .* 2020-01-31"):
        refuse_other_settings(new, dated, name="store")


def test_facts_of_a_gguf_file_are_those_of_the_loaded_base(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    loaded = facts_of(load_base(str(path), forward=FORWARD))
    assert replace(read_facts(str(path)), tokenizer=loaded.tokenizer) == loaded


def test_a_token_beyond_the_embedding_is_refused_before_the_base_is_loaded(
    without_weights: Path, tmp_path: Path
) -> None:
    config = json.loads((without_weights / "config.json").read_text())
    config["vocab_size"] = 40
    (without_weights / "config.json").write_text(json.dumps(config))
    good = write_corpus(tmp_path / "good.jsonl", num_samples=3)
    with pytest.raises(InputError, match=r"sample 'text-0': token .* expected an id below 40"):
        plan(without_weights, good, tmp_path / "store")
