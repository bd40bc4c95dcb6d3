"""How the texts of a store stood before the base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_stores import error_of, extract_tiny

from carryon.cache.base.identity import digest_chat_template
from carryon.cache.base.model import Base
from carryon.cache.format.framing import Framing, framing_of, merge_framings
from carryon.cache.format.manifest import read_manifest
from carryon.cache.settings import CorpusSettings
from carryon.cache.store.reader import Store


@pytest.mark.parametrize(
    ("kinds", "is_chat"),
    [
        ({}, None),
        ({"messages": 1}, True),
        ({"preference pair": 2}, True),
        ({"text": 3}, False),
        ({"prompt and completion": 3, "messages": 2}, False),
        ({"text": 2, "messages": 2}, True),
    ],
)
def test_what_most_samples_are_decides(kinds: dict[str, int], is_chat: bool | None) -> None:
    assert Framing(kinds=kinds).is_chat == is_chat


def test_a_framing_survives_its_json_form() -> None:
    framing = Framing(
        kinds={"text": 2},
        chat_template="{{ messages }}",
        chat_template_sha256="ab",
        chat_template_kwargs=("a=1",),
        template_date="2026-01-31",
    )
    assert Framing.from_dict(framing.to_dict()) == framing
    assert Framing.from_dict({}) == Framing()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([], "framing: expected an object, got list"),
        ({"other\n": 1}, r"framing: unknown key 'other\n'"),
        ({"kinds": {"text": True}}, "framing: kinds: expected whole numbers by name"),
        ({"kinds": 3}, "framing: kinds: expected whole numbers by name"),
        ({"chat_template": 3}, "framing: expected texts of at most 1048576 characters"),
        (
            {"chat_template": "x" * (1 << 21)},
            "framing: expected texts of at most 1048576 characters",
        ),
        ({"chat_template_kwargs": "a=1"}, "framing: chat_template_kwargs: expected a list"),
        ({"chat_template_kwargs": [3]}, "framing: expected texts of at most 1048576 characters"),
    ],
)
def test_a_framing_of_another_form_is_refused(values: Any, problem: str) -> None:  # noqa: ANN401
    assert error_of(lambda: Framing.from_dict(values)) == f"InputError: {problem}"


def test_the_framing_of_stores_together_has_the_samples_of_all() -> None:
    first = Framing(kinds={"text": 2}, chat_template="{{ a }}")
    second = Framing(kinds={"text": 1, "messages": 4}, chat_template="{{ b }}")
    assert merge_framings([first, second]) == replace(first, kinds={"text": 3, "messages": 4})
    assert merge_framings([first, Framing()]).kinds == {}


def test_a_store_tells_how_its_texts_were_framed(
    tiny_base: Base, store_original: Path, store_tmp: Path
) -> None:
    assert Store.open(store_original).framing == Framing(
        kinds={"text": 12}, chat_template_sha256=digest_chat_template(tiny_base.tokenizer)
    )
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}{{ strftime_now('%Y') }}"
    (store_tmp / "own.jinja").write_text(template)
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(n)}]}
        for n in range(3)
    ]
    (store_tmp / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = CorpusSettings(
        chat_template=str(store_tmp / "own.jinja"),
        chat_template_kwargs=["a=1"],
        template_date="2026-01-31",
    )
    extract_tiny(tiny_base, store_tmp / "data.jsonl", store_tmp / "store", corpus=settings)
    framing = Store.open(store_tmp / "store").framing
    assert framing.kinds == {"messages": 3}
    assert framing.chat_template == template
    assert framing.chat_template_kwargs == ("a=1",)
    assert framing.template_date == "2026-01-31"


def test_of_an_old_store_the_kinds_are_not_known(store_original: Path) -> None:
    manifest = read_manifest(store_original)
    old = replace(
        manifest,
        corpus={"mask": "auto", "max_tokens": 64, "long": "truncate"},
        parts=[replace(part, kinds={}) for part in manifest.parts],
    )
    first = manifest.parts[0]
    assert framing_of(replace(manifest, parts=[first, replace(first, kinds={})])).is_chat is None
    framing = framing_of(old)
    assert framing.is_chat is None
    assert framing.template_date == ""
