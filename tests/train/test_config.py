"""Settings are refused at construction, with every problem named."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from carryon.cache.errors import InputError
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
    TrainSettings,
)

ALL = (
    CarryOnSettings,
    OptimizationSettings,
    StreamSettings,
    LossSettings,
    MemorySettings,
    RunSettings,
)


@pytest.mark.parametrize(
    ("cls", "values", "text"),
    [
        (CarryOnSettings, {"width": 1}, "width: expected 2 to 65536, got 1"),
        (CarryOnSettings, {"heads": 3}, "double divides the width 128, got 3"),
        (CarryOnSettings, {"taps": []}, "taps: expected at least 1, got none"),
        (
            CarryOnSettings,
            {"taps": ["final", "final"]},
            "taps: expected each once",
        ),
        (CarryOnSettings, {"gate": "open"}, "gate: expected channel, token or none, got open"),
        (OptimizationSettings, {"epochs": 0}, "epochs: expected 1 or more, got 0"),
        (
            OptimizationSettings,
            {"learning_rate": float("nan")},
            "learning_rate: expected 0 or more",
        ),
        (OptimizationSettings, {"warmup_ratio": 2.0}, "warmup_ratio: expected 0 to 1, got 2.0"),
        (OptimizationSettings, {"micro_batch_tokens": 9999}, "0 to tokens_per_step, which is 1024"),
        (OptimizationSettings, {"schedule": "step"}, "constant, knee or multistep, got step"),
        (
            StreamSettings,
            {"held_out_ratio": 1.0},
            "held_out_ratio: expected more than 0 and below 1",
        ),
        (
            StreamSettings,
            {"decoded_cache_gb": float("inf")},
            "decoded_cache_gb: expected a finite number, got inf",
        ),
        (
            StreamSettings,
            {"store_weights": [1.0, float("inf")]},
            "store_weights: expected a finite number, got 1.0 inf",
        ),
        (StreamSettings, {"window_units": 0}, "window_units: expected 1 or more, got 0"),
        (LossSettings, {"chunk_tokens": -1}, "chunk_tokens: expected 0 or more, got -1"),
        (LossSettings, {"kl_weight": -1.0}, "kl_weight: expected 0 or more, got -1.0"),
        (
            LossSettings,
            {"gradient_filter": 1.0},
            "gradient_filter: expected 0 or more and below 1, got 1.0",
        ),
        (LossSettings, {"sampled_softmax": -1}, "sampled_softmax: expected 0 or more, got -1"),
        (
            LossSettings,
            {"sampled_softmax": 8, "kl_weight": 0.1},
            "sampled_softmax: expected 0 with gradient_filter or kl_weight",
        ),
        (LossSettings, {"head_place": "disk"}, "expected device, host or mapped, got disk"),
        (MemorySettings, {"optimizer_bits": 4}, "optimizer_bits: expected 32 or 8, got 4"),
        (RunSettings, {"keep_checkpoints": 1}, "keep_checkpoints: expected 2 or more"),
        (RunSettings, {"saved_dtype": "int8"}, "expected bfloat16 or float32, got int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_setting_is_refused_at_construction(
    cls: type[Any], values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        cls(**values)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"epochs: .*; .*seed: expected 0 or more, got -1"):
        OptimizationSettings(epochs=0, seed=-1)


def test_options_of_all_groups_are_given_by_name() -> None:
    settings = TrainSettings.from_options(width=64, learning_rate=1e-3, taps=("final", "layer.1"))

    assert settings.carryon == CarryOnSettings(width=64, taps=["final", "layer.1"])
    assert settings.optimization == OptimizationSettings(learning_rate=1e-3)
    assert TrainSettings.from_options(**settings.to_flat()) == settings


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 1e-3}, r"no setting lr: did you mean learning_rate\?"),
        ({"learning_rates": 1e-3}, r"no setting learning_rates: did you mean learning_rate\?"),
        ({"rank": 4}, r"no setting rank: did you mean lora_rank\?"),
        ({"colour": "red"}, "no setting colour: none of 60 is similar"),
        ({"width": "wide"}, "width: expected a whole number, got 'wide'"),
        ({"recompute": "maybe"}, "recompute: expected true or false, got 'maybe'"),
    ],
)
def test_an_unknown_or_wrong_option_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        TrainSettings.from_options(**options)


@pytest.mark.parametrize("cls", ALL)
def test_settings_come_back_from_plain_values(cls: type[Any]) -> None:
    assert cls.from_dict(cls().to_dict()) == cls()


@pytest.mark.parametrize("cls", ALL)
def test_an_unknown_key_is_refused(cls: type[Any]) -> None:
    with pytest.raises(InputError, match=f"{cls.__name__}: unknown setting colour"):
        cls.from_dict({"colour": "red"})


def test_field_names_are_unique_so_that_settings_can_be_flat() -> None:
    names = [item.name for cls in ALL for item in fields(cls)]

    assert len(names) == len(set(names))


def test_importing_the_settings_does_not_load_torch() -> None:
    code = "import sys, carryon.train.config; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"
