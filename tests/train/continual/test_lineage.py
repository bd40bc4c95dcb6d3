"""Lineages: releases leave the trunk unchanged, resume, and can be rebuilt with the same bits."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_runs import TINY, assert_same_bits, begin_update, folder_bytes, write_texts
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError, KnownDataError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.train.continual.lineage import release, update
from carryon.train.continual.lineage_dir import Lineage, open_lineage, read_lineage
from carryon.train.continual.versions import list_versions
from carryon.train.inference.evaluate import evaluate
from carryon.train.optim.lr_paths import path_rate
from carryon.train.trainer import run as run_module
from carryon.train.trainer.checkpoint import newest_checkpoint
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run import Job
from carryon.train.trainer.segment import Segment, digest_of_state
from carryon.train.trainer.trainer import train_jointly

SETTINGS = TINY.with_options(min_lr_ratio=0.1, log_every=1, dropout=0.2)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("stores")
    return [str(make_tiny_store(root / f"{seed}", samples_seed=seed)) for seed in (1, 2, 3)]


def _update_all(root: str, stores: list[str]) -> None:
    for store in stores:
        update(lineage=root, store=[store], settings=SETTINGS)


@pytest.fixture(scope="module")
def grown(stores: list[str], tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    root = tmp_path_factory.mktemp("grown") / "lineage"
    _update_all(str(root), stores)
    lineage = read_lineage(root)
    assert lineage is not None
    return lineage


def test_the_trunk_has_the_bits_of_one_that_never_branched(
    grown: Lineage, stores: list[str], tmp_path: Path
) -> None:
    start = None
    for version, store in enumerate(stores[:2], 1):
        steps = grown.increments[version - 1].steps
        segment = Segment(
            paradigm="trunk",
            version=version,
            ends=tuple(grown.ends[:version]),
            alpha=grown.alpha,
            first=0,
            stop=steps,
            offset=grown.ends[version - 1] - steps,
            start=start,
        )
        out = tmp_path / str(version)
        train_jointly([store], [Job(out=str(out), settings=SETTINGS, segment=segment)])
        start = newest_checkpoint(out / "checkpoints")
        tail = newest_checkpoint(grown.tail(version).checkpoints)
        assert start is not None
        assert tail is not None
        assert digest_of_state(tail) == digest_of_state(start)


def test_every_version_took_the_learning_rates_of_its_path(grown: Lineage) -> None:
    for version in (1, 2, 3):
        lines = read_metrics(grown.head(version).metrics) + read_metrics(
            grown.version(version).metrics
        )
        rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
        first = grown.ends[version - 1] - grown.increments[version - 1].steps
        assert rates == [
            path_rate(
                step,
                paradigm="switch",
                version=version,
                ends=grown.ends,
                alpha=0.6,
                settings=SETTINGS.optimization,
            )
            for step in range(first, grown.ends[version - 1])
        ]
        assert rates[-1] == 0.02 * 0.1


def test_a_rebuilt_version_has_the_same_bits(grown: Lineage, tmp_path: Path) -> None:
    release(grown, 2, settings=SETTINGS, out=tmp_path / "again")

    assert_same_bits(tmp_path / "again", grown.version(2).root)


def _trunk_state(lineage: Lineage) -> Path:
    path = newest_checkpoint(lineage.head(2).checkpoints)
    assert path is not None
    return path


def _flip_a_bit(lineage: Lineage) -> None:
    path = _trunk_state(lineage) / "carryon.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def _sound_but_another(lineage: Lineage) -> None:
    path = _trunk_state(lineage)
    shutil.rmtree(path)
    other = newest_checkpoint(lineage.head(3).checkpoints)
    assert other is not None
    assert other.name == path.name
    shutil.copytree(other, path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_flip_a_bit, "the content differs from its SHA-256"),
        (lambda lineage: shutil.rmtree(_trunk_state(lineage)), "expected a file, found none"),
        (_sound_but_another, r"expected the state \w{12} that .*versions/0002 started from"),
    ],
)
def test_a_version_starts_from_no_other_state_of_the_trunk(
    grown: Lineage, tmp_path: Path, change: Callable[[Lineage], object], text: str
) -> None:
    copy = open_lineage(shutil.copytree(grown.root, tmp_path / "lineage"))
    change(copy)

    with pytest.raises(InputError, match=rf"{text}.*Fix: .*delete .*0002-head and run the same"):
        release(copy, 2, settings=SETTINGS, out=tmp_path / "again")


def test_a_later_checkpoint_in_a_segment_of_the_trunk_is_not_started_from(
    grown: Lineage, tmp_path: Path
) -> None:
    copy = open_lineage(shutil.copytree(grown.root, tmp_path / "lineage"))
    newest = newest_checkpoint(copy.tail(2).checkpoints)
    assert newest is not None
    shutil.copytree(newest, copy.head(2).checkpoints / "step-00000099")

    release(copy, 2, settings=SETTINGS, out=tmp_path / "again")

    assert_same_bits(tmp_path / "again", grown.version(2).root)


@pytest.mark.parametrize("last_step", [1, 9, 14, 19])
def test_an_interrupted_update_resumes_to_the_same_bits(
    grown: Lineage,
    stores: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last_step: int,
) -> None:
    taken = 0

    def stop_after(*args: Any, **options: Any) -> Any:  # noqa: ANN401 -- as take_step
        nonlocal taken
        taken += 1
        if taken > last_step:
            raise KeyboardInterrupt
        return real(*args, **options)

    real = run_module.take_step
    root = str(tmp_path / "lineage")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "take_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            _update_all(root, stores[:2])
    lineage = read_lineage(root)
    assert lineage is not None
    _update_all(root, stores[len(lineage.increments) - 1 : 2])

    assert_same_bits(lineage.version(2).root, grown.version(2).root)


def test_an_update_without_new_data_returns_the_report_of_the_version_that_has_them(
    grown: Lineage, stores: list[str]
) -> None:
    before = folder_bytes(grown.root)

    for given, version in ((stores[:2], 2), (stores, 3), (stores[:1], 1)):
        report = update(lineage=str(grown.root), store=given, settings=SETTINGS)
        assert report.carryon == str(grown.version(version).carryon)

    assert folder_bytes(grown.root) == before


def test_a_changed_schedule_is_refused(grown: Lineage, tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", samples_seed=9)

    with pytest.raises(InputError, match="first update, got schedule cosine -> knee"):
        update(
            lineage=str(grown.root),
            store=[str(store)],
            settings=SETTINGS.with_options(schedule="knee"),
        )


def test_a_store_of_another_base_is_refused(
    grown: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_tiny_store(tmp_path / "store", samples_seed=9)
    other = replace(grown, base={"id": "other", "weights_sha256": "1" * 64})
    monkeypatch.setattr("carryon.train.continual.lineage.read_lineage", lambda root: other)

    with pytest.raises(InputError, match="expected the base of the lineage .*, other .weights 11"):
        update(lineage=str(grown.root), store=[str(store)], settings=SETTINGS)


def test_too_few_steps_for_alpha_leave_no_lineage(stores: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha: expected 0.05 of the increment's"):
        update(lineage=str(tmp_path / "new"), store=[stores[0]], settings=SETTINGS, alpha=0.05)

    assert not (tmp_path / "new").exists()


def test_versions_are_listed_with_their_cost_and_losses(grown: Lineage) -> None:
    versions = list_versions(grown.root, device="cpu")

    assert [version.version for version in versions] == [1, 2, 3]
    assert [version.steps for version in versions] == grown.ends
    for version in versions:
        index = version.version - 1
        report = json.loads(grown.version(version.version).result.read_text())
        assert len(version.held_out) == len(version.base) == 3
        own, base = version.held_out[index], version.base[index]
        assert own["loss"] == pytest.approx(report["carryon_nll"], rel=1e-6)
        assert own["se"] == pytest.approx(report["carryon_nll_se"], rel=1e-6)
        assert base["loss"] == pytest.approx(report["base_nll"], rel=1e-6)
        assert own["targets"] == base["targets"] == report["held_out_targets"]
        assert version.from_scratch_steps == sum(grown.ends[: index + 1])
    assert versions[0].total_steps == versions[0].from_scratch_steps == versions[0].steps
    assert versions[2].total_steps == _steps_taken(grown)
    assert (grown.root / "versions.png").exists()
    assert (grown.root / "paths.png").exists()


def test_losses_that_were_measured_before_are_kept(grown: Lineage, tmp_path: Path) -> None:
    root = Path(shutil.copytree(grown.root, tmp_path / "lineage"))
    old = {f"{version} on {on}": 1.0 for version in ("base", 1, 2, 3) for on in (1, 2, 3)}
    (root / "versions.json").write_text(json.dumps(old))

    versions = list_versions(root, device="cpu")

    loss = {"loss": 1.0, "se": None, "targets": None}
    assert versions[2].held_out == versions[2].base == [loss] * 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_texts(folder / f"{number}.jsonl") for number in range(3)]


@pytest.fixture(scope="module")
def growing(
    texts: list[Path], tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """A lineage after one update, after two and after three, all from one growing store."""
    root = tmp_path_factory.mktemp("growing") / "lineage"
    copies = []
    for number, path in enumerate(texts, 1):
        update(lineage=str(root), data=[str(path)], base=str(tiny_base_folder), settings=SETTINGS)
        copies.append(Path(shutil.copytree(root, root.with_name(str(number)))))
    return [*copies[:2], root]


def test_every_update_is_a_part_of_one_store_and_its_version_can_be_rebuilt(
    growing: list[Path], tmp_path: Path
) -> None:
    lineage = open_lineage(growing[2])

    assert [each.stores for each in lineage.increments] == [
        [f"{growing[2] / 'store'}#{number}"] for number in (1, 2, 3)
    ]
    for version in (1, 2):
        release(lineage, version, settings=SETTINGS, out=tmp_path / str(version))
        assert_same_bits(tmp_path / str(version), lineage.version(version).root)


def test_an_appended_store_gives_the_bits_of_separate_stores(
    growing: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    lineage = open_lineage(growing[1])
    stores = [str(tmp_path / "1"), str(tmp_path / "2")]
    for path, store in zip(texts, stores, strict=False):
        extract(
            base=str(tiny_base_folder),
            data=[path],
            out=store,
            corpus=CorpusSettings(),
            store=StoreSettings(),
            forward=ForwardSettings(device="cpu"),
        )
    root = str(tmp_path / "lineage")
    _update_all(root, stores)

    again = open_lineage(root)
    assert [each.fingerprints for each in again.increments] == [
        each.fingerprints for each in lineage.increments
    ]
    assert_same_bits(again.version(2).root, lineage.version(2).root)


def test_parts_that_were_appended_elsewhere_are_the_new_data(
    growing: list[Path], tmp_path: Path
) -> None:
    root = str(tmp_path / "lineage")
    store = str(growing[2] / "store")
    update(lineage=root, store=[f"{store}#1"], settings=SETTINGS)
    update(lineage=root, store=[store], settings=SETTINGS)

    assert [each.stores for each in open_lineage(root).increments] == [
        [f"{store}#1"],
        [f"{store}#2", f"{store}#3"],
    ]


def test_a_version_is_evaluated_on_the_held_out_samples_of_its_parts(
    growing: list[Path],
) -> None:
    carryon = str(growing[2] / "versions" / "0002" / "carryon")
    store = str(growing[2] / "store")

    old, new = (evaluate(store=f"{store}#{part}", carryon=carryon, device="cpu") for part in (1, 2))
    report = json.loads((growing[2] / "versions" / "0002" / "result.json").read_text())
    assert [old.samples, new.samples] == ["held-out", "held-out"]
    assert new.carryon_nll == pytest.approx(report["carryon_nll"], rel=1e-6)
    with pytest.raises(InputError, match="trained on #1, #2 of it, .* evaluate on .*store#2"):
        evaluate(store=store, carryon=carryon, device="cpu")


@pytest.mark.slow
def test_an_update_killed_in_any_stage_ends_with_the_same_bits(
    growing: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    """Each stage is killed once, at a random instant after its first file, one after another."""
    root = tmp_path / "lineage"
    shutil.copytree(growing[0], root)
    picks, num_landed = random.Random(5), 0
    stages = ("store/tokens/c/1", "trunk/0001-tail/run.json", "trunk/0002-head/run.json")
    for first_file in (*stages, "versions/0002/run.json"):
        process = begin_update(root, texts[1], tiny_base_folder, SETTINGS)
        while process.is_alive() and not (root / first_file).exists():
            process.join(0.002)
        process.join(picks.uniform(0.0, 0.2))
        num_landed += process.is_alive()
        process.kill()
        process.join()
        if open_lineage(root).released == [1, 2]:
            break
    else:
        update(
            lineage=str(root),
            data=[str(texts[1])],
            base=str(tiny_base_folder),
            settings=SETTINGS,
        )

    assert num_landed > 0
    assert_same_bits(open_lineage(root).version(2).root, growing[1] / "versions" / "0002")


def test_texts_that_are_already_in_the_store_give_the_report_of_their_version(
    growing: list[Path], texts: list[Path], tiny_base_folder: Path
) -> None:
    for version in (3, 1):
        report = update(
            lineage=str(growing[2]),
            data=[str(texts[version - 1])],
            base=str(tiny_base_folder),
            settings=SETTINGS,
        )
        assert report.carryon == str(open_lineage(growing[2]).version(version).carryon)


def test_new_texts_beside_known_ones_are_not_lost(
    growing: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    new = write_texts(tmp_path / "new.jsonl")
    with pytest.raises(KnownDataError, match="got a file equal to 2.jsonl of part 3"):
        update(
            lineage=str(growing[2]),
            data=[str(texts[2]), str(new)],
            base=str(tiny_base_folder),
            settings=SETTINGS,
        )


def test_texts_for_another_base_are_refused_before_anything_is_extracted(
    growing: list[Path], texts: list[Path], tmp_path: Path
) -> None:
    other_base = make_tiny_base(tmp_path / "other", seed=1)
    before = Store.open(growing[0] / "store").fingerprint

    with pytest.raises(InputError, match="expected the base of the lineage"):
        update(
            lineage=str(growing[0]),
            data=[str(texts[1])],
            base=str(other_base),
            settings=SETTINGS,
        )
    assert Store.open(growing[0] / "store").fingerprint == before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expected --data or --store with the new data, got neither"),
        ({"data": ["a.jsonl"]}, "expected the base that extracts --data"),
        ({"data": ["a.jsonl"], "base": "b", "store": ["c", "d"]}, "expected one, to which --data"),
    ],
)
def test_an_update_without_data_or_base_is_refused(
    given: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        update(lineage=str(tmp_path / "new"), settings=SETTINGS, **given)

    assert not (tmp_path / "new").exists()


def test_an_update_without_settings_uses_those_of_the_lineage(
    grown: Lineage, stores: list[str]
) -> None:
    assert update(grown.root, store=stores[0]).carryon == str(grown.version(1).carryon)
    with pytest.raises(InputError, match=r"expected the settings of the first update, got width"):
        update(grown.root, store=stores[0], width=4)


def _steps_taken(lineage: Lineage) -> int:
    steps = 0
    for path in lineage.root.glob("*/*/metrics.jsonl"):
        steps += sum("loss" in line for line in read_metrics(path))  # log_every is 1
    return steps
