"""Stores with valid checksums whose states, norm or head are not the base's are refused.

Each is written from wrong inputs through the ordinary writers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_stores import SETTINGS, Given, files_below, make_given, write_store

from carryon.cache.base.lm_head import FinalNorm
from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify

TAPS = ["final", "prenorm", "layer.1", "layer.2"]
HEAD = "the head does not turn the probe's states into"


@dataclass(frozen=True, kw_only=True)
class Lie:
    id: str
    tell: Callable[[Given], Given]
    text: str
    head: dict[str, Any] | None = None


def with_head(**changes: Any) -> Callable[[Given], Given]:  # noqa: ANN401 -- fields of Head
    return lambda given: replace(given, head=replace(given.head, **changes))


def with_norm(**changes: Any) -> Callable[[Given], Given]:  # noqa: ANN401 -- fields of FinalNorm
    return lambda given: replace(
        given, head=replace(given.head, norm=replace(given.head.norm, **changes))
    )


def with_hidden(tap: str, other: str) -> Callable[[Given], Given]:
    return lambda given: replace(given, hidden=given.hidden | {tap: given.hidden[other]})


def with_rows_shifted(given: Given) -> Given:
    states = given.hidden["final"]
    shifted = np.where(states.any(axis=1, keepdims=True), np.roll(states, 1, axis=0), 0)
    return replace(given, hidden=given.hidden | {"final": shifted})


def permuted(given: Given) -> Given:
    order = np.random.default_rng(0).permutation(given.head.vocab_size)
    return with_head(weight=given.head.weight[order])(given)


def of_other_base(given: Given) -> Given:
    return with_head(weight=make_given(seed=9).head.weight)(given)


LIES = [
    Lie(id="head rows permuted", tell=permuted, text=HEAD),
    Lie(id="head of another base", tell=of_other_base, text=HEAD),
    Lie(id="logit scale", tell=with_head(logit_scale=1.25), text=HEAD),
    Lie(id="softcap left out", tell=with_head(softcap=None), text=HEAD, head={"softcap": 4.0}),
    Lie(id="softcap of another size", tell=with_head(softcap=8.0), text=HEAD,
        head={"softcap": 4.0}),
    Lie(id="scale left out", tell=with_head(logit_scale=1.0), text=HEAD,
        head={"logit_scale": 0.25}),
    Lie(id="bias that is not there", tell=with_head(bias=np.ones(256, np.float32)), text=HEAD),
    Lie(id="norm weight without its offset", tell=with_norm(weight_offset=1.0), text="the norm"),
    Lie(id="another norm weight", tell=with_norm(weight=np.ones(16, np.float32)), text="the norm"),
    Lie(id="another kind of norm", tell=with_norm(kind="layer"), text="the norm"),
    Lie(id="prenorm stored as final", tell=with_hidden("final", "prenorm"), text="tap final"),
    Lie(id="final stored as prenorm", tell=with_hidden("prenorm", "final"), text="tap prenorm"),
    Lie(id="layer 2 stored as layer 1", tell=with_hidden("layer.1", "layer.2"),
        text="tap layer.1"),
    Lie(id="final stored as the last layer", tell=with_hidden("layer.2", "final"),
        text="tap layer.2"),
    Lie(id="states one row off", tell=with_rows_shifted, text="tap final"),
]  # fmt: skip


@pytest.mark.parametrize("profile", ["exact", "compact"])
@pytest.mark.parametrize("case", LIES, ids=lambda case: case.id)
def test_inconsistent_states_head_or_norm_are_refused_on_opening(
    store_tmp: Path, case: Lie, profile: str
) -> None:
    settings = StoreSettings.from_dict(SETTINGS.to_dict() | {"taps": TAPS, "profile": profile})
    honest = make_given(settings=settings, **(case.head or {}))
    # The pilot holds the base's true states; the stored facts differ from them.
    write_store(store_tmp / "store", case.tell(honest))
    with pytest.raises(DamagedStoreError, match=f"store: ?{case.text}"):
        Store.open(store_tmp / "store")
    (problem,) = verify(store_tmp / "store", depth="quick").problems
    assert (problem.path, problem.unit) == ("probe", None)


@pytest.mark.parametrize("profile", ["exact", "compact"])
@pytest.mark.parametrize("head", [{}, {"softcap": 4.0}, {"logit_scale": 0.25}], ids=str)
def test_a_consistent_store_opens(store_tmp: Path, profile: str, head: dict[str, Any]) -> None:
    settings = StoreSettings.from_dict(SETTINGS.to_dict() | {"taps": TAPS, "profile": profile})
    write_store(store_tmp / "store", make_given(settings=settings, **head))
    assert Store.open(store_tmp / "store").taps == TAPS


def test_states_computed_in_other_batches_are_accepted(store_tmp: Path) -> None:
    given = make_given(settings=StoreSettings.from_dict(SETTINGS.to_dict() | {"taps": TAPS}))
    random = np.random.default_rng(0)
    noisy = {
        tap: values * (1 + 0.01 * random.normal(size=values.shape).astype(np.float32))
        for tap, values in given.hidden.items()
    }
    write_store(store_tmp / "store", replace(given, hidden=noisy))
    assert Store.open(store_tmp / "store").taps == TAPS


def test_nan_logits_are_refused(store_tmp: Path) -> None:
    weight = np.full((256, 16), np.nan, dtype=np.float32)
    given = with_head(weight=bfloat16_bits(weight))(make_given())
    write_store(store_tmp / "store", given)
    with pytest.raises(DamagedStoreError, match=f"{HEAD}.*got nan"):
        Store.open(store_tmp / "store")


def test_the_probe_lies_within_the_first_unit(store_tmp: Path) -> None:
    write_store(store_tmp / "store", make_given())
    files = files_below(store_tmp / "store")
    assert "probe/rows/c/0" in files
    norm = FinalNorm(
        kind="rms", eps=0.0, weight_offset=0.0, weight=np.ones(2, np.float32), bias=None
    )
    np.testing.assert_allclose(norm.apply(np.array([[3.0, 4.0]])), [[0.8485, 1.1314]], atol=1e-4)
