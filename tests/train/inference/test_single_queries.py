"""Attention of one new token a row: the same numbers, without keys copied for each head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny_bases import make_tiny_base
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from carryon.cache.base.model import Base, load_base
from carryon.cache.settings import ForwardSettings
from carryon.train.inference import generate
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.single_queries import packed_heads

SETTINGS = GenerateSettings(max_new_tokens=5)
ROWS = [[5, 6, 7, 8, 9, 5], [9, 8, 7, 6, 5, 4], [4, 4, 4, 5, 7, 7]]
"""Of equal lengths: no row is padded."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = make_tiny_base(tmp_path_factory.mktemp("bases") / "grouped", num_key_value_heads=1)
    return load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="bfloat16"))


class Spied:
    """Calls of torch's attention: queries, key heads, and whether keys are copied for each head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = list[tuple[int, int, int, bool]]()
        attend = torch.nn.functional.scaled_dot_product_attention

        def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
            is_copied = bool(options.get("enable_gqa"))
            self.calls.append((query.shape[1], query.shape[2], key.shape[1], is_copied))
            return attend(query, key, value, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", call)


def test_heads_of_a_group_are_queries_of_one_key_head(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CarryOnForCausalLM.from_base(base)
    config: Any = base.model.config
    heads = config.num_attention_heads
    assert config.num_key_value_heads == 1 < heads
    spied = Spied(monkeypatch)
    generate.generate_rows(model, ROWS, settings=SETTINGS)
    decoded = [call for call in spied.calls if call[1] == heads]
    assert decoded == [(1, heads, 1, False)] * len(decoded)
    assert len(decoded) >= config.num_hidden_layers * (SETTINGS.max_new_tokens - 1)
    assert not any(queries == 1 and is_copied for _, queries, _, is_copied in spied.calls)


@pytest.mark.parametrize("rows", [ROWS, [[5, 6], *ROWS]])
@torch.no_grad()
def test_the_next_token_has_the_same_logits(base: Base, rows: list[list[int]]) -> None:
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])

    def next_logits() -> Tensor:
        first = base.model(tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        more = base.model(
            tokens[:, -1:], attention_mask=mask, past_key_values=first.past_key_values
        )
        logits: Tensor = more.logits
        return logits

    expected = next_logits()
    with packed_heads():
        made = next_logits()
    torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-2)  # of bfloat16
    assert made.abs().max() > 0.5


def test_attention_that_somebody_has_registered_is_kept(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], list[int]()

    def attend(module: Any, query: Tensor, *given: Any, **options: Any) -> Any:  # noqa: ANN401
        calls.append(query.shape[2])
        return own(module, query, *given, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)
    generate.generate_rows(CarryOnForCausalLM.from_base(base), ROWS, settings=SETTINGS)
    assert calls.count(1) >= SETTINGS.max_new_tokens - 1
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend


def test_attention_of_others_is_as_before_behind_the_block(base: Base) -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with packed_heads(), packed_heads():  # as two threads
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    model = CarryOnForCausalLM.from_base(base)
    with pytest.raises(IndexError):
        generate.generate_rows(model, [[10**9]], settings=replace(SETTINGS, seed=1))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
