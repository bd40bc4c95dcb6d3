"""What is saved comes back, and nothing is pickled."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny_carryons import resign
from support.tiny_stores import states_at_kills

from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.card import CarryOnCard, check_base
from carryon.train.modules.card_file import check_digest
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.serialization import (
    CARD,
    README,
    WEIGHTS,
    load_carryon,
    locate_carryon,
    read_card,
    save_carryon,
    write_alpha,
)

SETTINGS = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)


def _carryon(seed: int = 0) -> CarryOn:
    return build_bottleneck(SETTINGS, base_width=16, seed=seed)


def _card() -> CarryOnCard:
    return CarryOnCard(
        settings=SETTINGS.to_dict(),
        base_width=16,
        base={"id": "org/tiny", "weights_sha256": "ab" * 32},
        store_fingerprint="cd" * 32,
        split={"held_out_ratio": 0.05, "seed": 0},
        alpha=0.75,
        figures={"held_out_nll_of_base": 1.25},
        versions={"torch": "2"},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    carryon = _carryon()

    num_bytes = save_carryon(tmp_path / "carryon", carryon, _card(), dtype=dtype)
    loaded, card = load_carryon(tmp_path / "carryon")

    assert card == _card()
    assert num_bytes == (tmp_path / "carryon" / WEIGHTS).stat().st_size
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, carryon.state_dict()[name].to(dtype).float()), name


def test_the_weights_are_on_the_cpu_whatever_device_is_the_default(tmp_path: Path) -> None:
    carryon = _carryon()
    save_carryon(tmp_path / "carryon", carryon, _card(), dtype=torch.float32)
    with torch.device("meta"):
        loaded, _ = load_carryon(tmp_path / "carryon")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, carryon.state_dict()[name]), name


def test_the_folder_holds_safetensors_json_and_a_card_for_people(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.bfloat16)

    names = sorted(path.name for path in (tmp_path / "carryon").iterdir())
    text = (tmp_path / "carryon" / "README.md").read_text(encoding="utf-8")

    assert names == ["README.md", CARD, WEIGHTS]
    assert all(
        x.dtype == torch.bfloat16 for x in load_file(tmp_path / "carryon" / WEIGHTS).values()
    )
    assert "org/tiny" in text
    assert "1.25" in text


def test_a_card_from_before_framings_were_recorded_is_read(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)
    values = json.loads((tmp_path / "carryon" / CARD).read_text(encoding="utf-8"))
    for name in ("framing", "files", "sha256"):
        del values[name]
    (tmp_path / "carryon" / CARD).write_text(json.dumps(values), encoding="utf-8")
    assert read_card(tmp_path / "carryon") == _card()
    values["framing"] = {"kinds": "text"}
    (tmp_path / "carryon" / CARD).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="framing: kinds: expected whole numbers by name"):
        read_card(tmp_path / "carryon")


@pytest.mark.parametrize(
    ("framing", "text"),
    [
        ({}, "not recorded"),
        ({"kinds": {"text": 1}}, "plain text, without a chat template"),
        ({"kinds": {"messages": 1}}, "the chat template of the base"),
        (
            {"kinds": {"messages": 1}, "chat_template": "{{ a }}"},
            "a chat template of its own, in carryon.json",
        ),
    ],
)
def test_the_card_for_people_says_how_prompts_should_stand(
    tmp_path: Path, framing: dict[str, Any], text: str
) -> None:
    card = replace(_card(), framing=framing)
    save_carryon(tmp_path / "carryon", _carryon(), card, dtype=torch.float32)
    readme = (tmp_path / "carryon" / README).read_text(encoding="utf-8")
    assert f"| prompt format | {text} |" in readme


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(0), _card(), dtype=torch.float32)
    save_carryon(tmp_path / "carryon", _carryon(1), _card(), dtype=torch.float32)

    loaded, _ = load_carryon(tmp_path / "carryon")

    assert torch.equal(loaded.bridges[0].weight, _carryon(1).bridges[0].weight)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["carryon"]


def test_a_folder_without_a_carryon_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        MissingError, match="expected a carry-on .* found none. Fix: run carryon train"
    ):
        load_carryon(tmp_path)


def test_a_card_of_another_format_is_refused(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)
    resign(tmp_path / "carryon", format_version=99)

    with pytest.raises(InputError, match="format version: expected 1, got 99"):
        load_carryon(tmp_path / "carryon")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)
    (tmp_path / "carryon" / WEIGHTS).write_bytes(b"not weights")

    with pytest.raises(InputError, match="the file was changed"):
        load_carryon(tmp_path / "carryon")
    resign(tmp_path / "carryon")
    with pytest.raises(InputError, match="expected the size that its header tells"):
        load_carryon(tmp_path / "carryon")


def test_a_carryon_of_another_base_is_refused_with_both_digests() -> None:
    other = {"id": "org/other", "weights_sha256": "ef" * 32}

    with pytest.raises(
        SettingMismatchError, match="the weights of org/tiny.*abababab.* of org/other .*efefefef"
    ):
        check_base(_card(), other, where="store")


def test_a_carryon_of_another_tokenizer_is_refused() -> None:
    card = replace(_card(), base={**_card().base, "tokenizer_sha256": "12" * 32})

    with pytest.raises(SettingMismatchError, match="expected the tokenizer of org/tiny.*121212"):
        check_base(card, {**card.base, "tokenizer_sha256": "34" * 32}, where="store")


def test_a_run_given_for_its_carryon_is_told_where_that_is(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)

    with pytest.raises(MissingError, match=f"found none. Fix: give {tmp_path / 'carryon'}"):
        load_carryon(tmp_path)


def test_a_carryon_of_the_same_weights_elsewhere_raises_nothing() -> None:
    check_base(_card(), {**_card().base, "id": "/copy"}, where="store")
    check_base(replace(_card(), alpha=0.0), _card().base, where="store")


def test_a_written_alpha_is_used_from_then_on_and_shown(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)

    write_alpha(tmp_path / "carryon", 0.7)

    _, card = load_carryon(tmp_path / "carryon")
    assert card == replace(_card(), alpha=0.7)
    assert "| alpha | 0.7 |" in (tmp_path / "carryon" / README).read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "carryon").iterdir()) == [README, CARD, WEIGHTS]
    with pytest.raises(MissingError, match="expected a carry-on"):
        write_alpha(tmp_path, 0.7)


def test_the_model_card_names_base_store_figures_and_use(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)

    text = (tmp_path / "carryon" / README).read_text(encoding="utf-8")

    for part in ("org/tiny", _card().store_fingerprint[:12], "carryon generate --carryon"):
        assert part in text
    assert all(f"| {value} |" in text for value in _card().figures.values())
    facts = yaml.safe_load(text.split("---")[1])
    assert facts["library_name"] == "carryon"


def test_the_model_card_of_a_local_base_names_no_path(tmp_path: Path) -> None:
    card = replace(_card(), base={**_card().base, "id": "/home/anna/models/tiny-base"})

    save_carryon(tmp_path / "carryon", _carryon(), card, dtype=torch.float32)

    text = (tmp_path / "carryon" / README).read_text(encoding="utf-8")
    assert "tiny-base" in text
    assert "anna" not in text
    assert "base_model" not in text
    assert read_card(tmp_path / "carryon") == card  # the base is found again from here
    assert card.without_paths().base["id"] == "tiny-base"


def test_a_folder_that_is_not_there_or_a_foreign_one_is_named(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(MissingError, match="expected a carry-on"):
            load_carryon(locate_carryon(source))


def test_a_carryon_replaced_and_killed_before_any_change_is_the_old_or_the_new_one(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    old, new = _carryon(seed=1), _carryon(seed=2)
    save_carryon(root / "carryon", old, _card(), dtype=torch.float32)

    copies = states_at_kills(
        root,
        lambda: save_carryon(root / "carryon", new, _card(), dtype=torch.float32),
        at=lambda _: True,
        into=tmp_path / "killed",
    )

    expected = [each.state_dict()["bridges.0.weight"] for each in (old, new)]
    seen = []
    for copy in copies:
        assert locate_carryon(copy / "carryon").is_dir()
        bridge = load_carryon(copy / "carryon")[0].state_dict()["bridges.0.weight"]
        seen.append([torch.equal(bridge, each) for each in expected].index(True))
        save_carryon(copy / "carryon", new, _card(), dtype=torch.float32)
        assert [path.name for path in copy.iterdir()] == ["carryon"]
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.bfloat16)
    before = torch.random.get_rng_state()

    load_carryon(tmp_path / "carryon")

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", [WEIGHTS, README])
def test_a_file_larger_than_it_says_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    save_carryon(tmp_path / "carryon", _carryon(), _card(), dtype=torch.float32)
    os.truncate(tmp_path / "carryon" / name, 1 << 40)
    with pytest.raises(InputError, match="expected the size|expected at most"):
        check_digest(tmp_path / "carryon" / name, "0" * 64)


def test_half_a_character_in_a_card_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "carryon"
    save_carryon(folder, _carryon(), _card(), dtype=torch.float32)
    resign(folder, store_fingerprint="\ud800")
    with pytest.raises(InputError, match="surrogates"):
        write_alpha(folder, 0.5)
