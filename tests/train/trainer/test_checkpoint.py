"""Whole or not there, exact, and only for the same run."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_stores import states_at_kills

from carryon.cache.errors import InputError
from carryon.cache.files.documents import sealed, write_json
from carryon.train.config import CarryOnSettings, MemorySettings, OptimizationSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn
from carryon.train.optim.optimizer import build_optimizer
from carryon.train.saved_settings import refuse_other_settings
from carryon.train.trainer.checkpoint import (
    STATE,
    Progress,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

IDENTITY = {"store_fingerprint": "ab", "learning_rate": 0.5}


def _pair(seed: int = 0) -> tuple[CarryOn, torch.optim.Optimizer]:
    settings = CarryOnSettings(width=4, blocks=1, heads=1, intermediate_size=4)
    carryon = build_bottleneck(settings, base_width=8, seed=seed)
    return carryon, build_optimizer(
        carryon, OptimizationSettings(learning_rate=0.01), MemorySettings()
    )


def _step(carryon: CarryOn, optimizer: torch.optim.Optimizer) -> None:
    states = {"final": torch.linspace(-1, 1, 2 * 3 * 8).reshape(2, 3, 8)}
    (carryon(states) - 1).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _progress(step: int) -> Progress:
    return Progress(
        step=step, epoch=1, step_in_epoch=2, tokens=3, targets=4, elapsed_s=5.5, wait_s=0.25
    )


def _save(
    folder: Path, carryon: CarryOn, optimizer: torch.optim.Optimizer, *, step: int = 7
) -> Path:
    return save_checkpoint(
        folder,
        carryon=carryon,
        optimizer=optimizer,
        progress=_progress(step),
        identity=IDENTITY,
        keep=2,
    )


def test_steps_after_loading_are_the_same_bits(tmp_path: Path) -> None:
    carryon, optimizer = _pair()
    _step(carryon, optimizer)
    path = _save(tmp_path, carryon, optimizer)
    _step(carryon, optimizer)

    other, other_optimizer = _pair(seed=9)
    progress = load_checkpoint(path, carryon=other, optimizer=other_optimizer, identity=IDENTITY)
    _step(other, other_optimizer)

    assert progress == _progress(7)
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, carryon.state_dict()[name]), name


def test_the_newest_whole_folder_is_the_newest_checkpoint(tmp_path: Path) -> None:
    carryon, optimizer = _pair()
    assert newest_checkpoint(tmp_path / "none yet") is None
    _save(tmp_path, carryon, optimizer, step=9)
    newest = _save(tmp_path, carryon, optimizer, step=10)
    (tmp_path / "step-00000011").mkdir()  # without its state: not ours, or cut short
    (tmp_path / "step-00000012.partial").mkdir()
    (tmp_path / "step-00000012.partial" / STATE).touch()

    assert newest_checkpoint(tmp_path) == newest


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    carryon, optimizer = _pair()

    for step in (1, 2, 3):
        _save(tmp_path, carryon, optimizer, step=step)

    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000003",
    ]


def test_a_checkpoint_of_another_store_or_setting_is_refused_with_both_values(
    tmp_path: Path,
) -> None:
    carryon, optimizer = _pair()
    path = _save(tmp_path, carryon, optimizer)
    other = {"store_fingerprint": "cd", "learning_rate": 0.25}

    with pytest.raises(InputError) as caught:
        load_checkpoint(path, carryon=carryon, optimizer=optimizer, identity=other)

    assert "store_fingerprint is 'ab' there and 'cd' here" in str(caught.value)
    assert "learning_rate is 0.5 there and 0.25 here" in str(caught.value)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    carryon, optimizer = _pair()
    path = _save(tmp_path, carryon, optimizer)
    document = json.loads((path / STATE).read_text())
    del document["sha256"]
    write_json(path / STATE, sealed({**document, "format_version": 99}))

    with pytest.raises(InputError, match="expected checkpoint format 2, got 99"):
        load_checkpoint(path, carryon=carryon, optimizer=optimizer, identity=IDENTITY)


def test_a_failed_write_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carryon, optimizer = _pair()
    _save(tmp_path, carryon, optimizer, step=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carryon.train.trainer.checkpoint.write_json", full)
    with pytest.raises(OSError, match="disk is full .* run the same command again"):
        _save(tmp_path, carryon, optimizer, step=2)

    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000001"]


def test_a_run_older_than_a_setting_resumes_without_it() -> None:
    refuse_other_settings({"width": 8}, {"width": 8, "sampled_softmax": 0}, name="run")

    with pytest.raises(InputError, match="sampled_softmax is None there and 5 here"):
        refuse_other_settings({"width": 8}, {"width": 8, "sampled_softmax": 5}, name="run")


def test_a_checkpoint_replaced_and_killed_before_any_change_can_be_resumed_from(
    tmp_path: Path,
) -> None:
    root = tmp_path / "checkpoints"
    carryon, optimizer = _pair()
    _save(root, carryon, optimizer, step=6)
    path = _save(root, carryon, optimizer, step=7)
    _step(carryon, optimizer)

    copies = states_at_kills(
        root,
        lambda: _save(root, carryon, optimizer, step=7),
        at=lambda _: True,
        into=tmp_path / "killed",
    )

    for copy in copies:
        newest = newest_checkpoint(copy)
        assert newest == copy / path.name
        load_checkpoint(newest, carryon=carryon, optimizer=optimizer, identity=IDENTITY)
        _save(copy, carryon, optimizer, step=7)
        assert not list(copy.glob(".*"))
