"""Carry-ons that merge: trained from a store with blocks, merged, exported, refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.small_disks import PAGE, file_size_limit, resize
from support.tiny_bases import make_tiny_base
from support.tiny_stores import states_at_kills, write_corpus
from transformers import AutoModelForCausalLM

from carryon.cache.errors import DiskFullError, InputError, SettingMismatchError
from carryon.cache.extraction.estimate import estimate
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.extraction.repair import repair
from carryon.cache.files.atomic import recover_folder
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.train.config import CarryOnSettings
from carryon.train.inference.evaluate import evaluate
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.merge import merge
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.carryon import build_carryon
from carryon.train.modules.packed_attention import pack
from carryon.train.modules.taps import resolve_taps
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.trainer import train

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=256)
CORPUS = CorpusSettings(mask="all", max_tokens=32)
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
TOKENS = torch.tensor([[1, 5, 9, 20, 33, 7, 60]])


@dataclass(frozen=True)
class Place:
    """A tiny base and its store."""

    base: Path
    store: Path


def make_place(
    root: Path,
    family: str = "llama",
    *,
    blocks: int = 1,
    taps: Sequence[str] = (),
    first_sample: int = 0,
) -> Place:
    """Extract a store with blocks from a tiny base, or append to it."""
    base = make_tiny_base(root / "base", family)
    data = write_corpus(root / "data.jsonl", num_samples=12, first=first_sample)
    extract(
        base=str(base),
        data=[data],
        out=root / "store",
        corpus=CORPUS,
        store=StoreSettings(
            taps=list(taps) or ["final", "prenorm", "layer.1", "layer.2"],
            unit_tokens=64,
            dtype="float32",
            with_blocks=blocks,
        ),
        forward=FORWARD,
        append=first_sample > 0,
    )
    return Place(base, root / "store")


def fit(
    place: Place,
    out: Path,
    **options: Any,  # noqa: ANN401 -- each setting has its own type
) -> Path:
    """Train a carry-on for a few steps; return its folder."""
    train(
        place.store,
        out=out,
        **{"blocks": 1, "epochs": 2, "tokens_per_step": 64, "learning_rate": 1e-2} | options,
        device="cpu",
    )
    return out / "carryon"


def plain_logits(folder: Path) -> torch.Tensor:
    """Return the logits of a checkpoint, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


def composed_logits(carryon: Path, place: Place) -> torch.Tensor:
    """Return the logits of the customized model."""
    model = CarryOnForCausalLM.from_pretrained(carryon, base=str(place.base), forward=FORWARD)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny Llama with one block in its store."""
    return make_place(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["native", "top"])
def test_an_untrained_kind_says_what_the_base_computed(
    tmp_path: Path, family: str, kind: Literal["native", "top"]
) -> None:
    """From packed samples, at every token."""
    store = Store.open(make_place(tmp_path, family).store)
    settings = resolve_taps(CarryOnSettings(kind=kind, blocks=1), store.manifest.base["num_layers"])
    module = build_carryon(settings, store, seed=0)
    unit = store.read_unit(0)
    num = int(unit.lengths.sum())
    states = {tap: torch.from_numpy(rows[:num]) for tap, rows in unit.hidden.items()}
    packing = pack(torch.from_numpy(unit.lengths).long())
    with torch.no_grad():
        actual = module.correct_packed(states, packing, torch.arange(num))
    torch.testing.assert_close(actual, states["final"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["native", "top"])
def test_a_merged_checkpoint_gives_the_customized_models_logits_and_loss(
    tmp_path: Path, family: str, kind: str
) -> None:
    """Loaded by transformers alone; the loss is the one measured from the store."""
    place = make_place(tmp_path, family)
    carryon = fit(place, tmp_path / "run", kind=kind)
    report = merge(carryon=carryon, out=tmp_path / "merged", device="cpu")
    logits = plain_logits(tmp_path / "merged")
    torch.testing.assert_close(logits, composed_logits(carryon, place), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, plain_logits(place.base), atol=1e-2)
    num_layers = Store.open(place.store).manifest.base["num_layers"]
    assert report["blocks"] == num_layers + (kind == "native")
    measured = evaluate(store=str(place.store), carryon=str(carryon), samples="all", device="cpu")
    assert measured.carryon_nll < measured.base_nll
    store = Store.open(place.store)
    losses = []
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for index in range(store.num_samples):
        tokens = torch.from_numpy(store.read_sample(index, taps=[]).tokens).long()[None]
        with torch.no_grad():
            scores = model(tokens).logits[0, :-1].log_softmax(-1)
        losses.append(-scores.gather(1, tokens[0, 1:, None]).flatten())
    assert float(torch.cat(losses).mean()) == pytest.approx(measured.carryon_nll, abs=2e-3)


@pytest.mark.parametrize(("kind", "tap"), [("native", "prenorm"), ("top", "layer.1")])
def test_a_store_of_a_kinds_own_tap_is_enough(
    tmp_path: Path, llama: Place, kind: str, tap: str
) -> None:
    """To train, with KL too, and to measure base and carry-on as a store with `final` does."""
    lean = make_place(tmp_path, taps=[tap])
    nlls = {}
    for kl_weight in (0.0, 100.0):
        out = tmp_path / f"run-{kl_weight:g}"
        carryon = str(fit(lean, out, kind=kind, kl_weight=kl_weight))
        for alpha in (0.0, 1.0):
            from_lean, from_whole = (
                evaluate(place.store, carryon=carryon, samples="all", alphas=[alpha], device="cpu")
                for place in (lean, llama)
            )
            assert from_lean.base_nll == pytest.approx(from_whole.base_nll, abs=2e-4)
            assert from_lean.carryon_nll == pytest.approx(from_whole.carryon_nll, abs=2e-4)
            assert (from_lean.carryon_nll == from_lean.base_nll) == (alpha == 0)
        before = read_metrics(out / "metrics.jsonl")[0]["held_out_nll"]
        held_out = evaluate(store=str(lean.store), carryon=carryon, device="cpu")
        assert held_out.base_nll == pytest.approx(before, abs=1e-6)
        nlls[kl_weight] = from_lean.carryon_nll
    assert nlls[0.0] < nlls[100.0] - 0.01 < from_lean.base_nll


def test_a_bottleneck_needs_the_tap_that_it_corrects(tmp_path: Path) -> None:
    """The error says how to extract it."""
    place = make_place(tmp_path, taps=["layer.1"])
    with pytest.raises(
        InputError, match=r"got layer.1. Fix: extract again with --taps layer.1 final$"
    ):
        fit(place, tmp_path / "run", taps=["layer.1"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_a_top_by_lora_is_an_ordinary_adapter_and_an_ordinary_checkpoint(
    tmp_path: Path, llama: Place
) -> None:
    """PEFT loads it onto the base."""
    from peft import PeftModel

    carryon = fit(llama, tmp_path / "run", kind="top", lora_rank=2)
    merge(carryon, base=str(llama.base), out=tmp_path / "lora", adapter=True, device="cpu")
    merge(carryon, base=str(llama.base), out=tmp_path / "merged", device="cpu")
    base: Any = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    with torch.no_grad():
        logits = adapted(TOKENS).logits
    composed = composed_logits(carryon, llama)
    torch.testing.assert_close(logits, composed, rtol=1e-4, atol=1e-4)
    error = (plain_logits(tmp_path / "merged") - composed).norm() / composed.norm()
    assert error < 0.02  # the sum of weight and LoRA is rounded to bfloat16
    assert not torch.allclose(logits, plain_logits(llama.base), atol=1e-2)


def test_a_merged_model_generates_what_its_logits_say(tmp_path: Path, llama: Place) -> None:
    """With a cache, block by block the same as without."""
    carryon = fit(llama, tmp_path / "run", kind="native")
    model = CarryOnForCausalLM.from_pretrained(carryon, base=str(llama.base), forward=FORWARD)
    actual = model.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    tokens = TOKENS
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert actual.tolist() == tokens.tolist()


def test_a_merge_killed_before_any_change_leaves_nothing_or_all_and_can_be_made_again(
    tmp_path: Path, llama: Place
) -> None:
    carryon = fit(llama, tmp_path / "run", kind="native")
    root = tmp_path / "root"
    (root / "merged").mkdir(parents=True)  # an empty folder is taken, and replaced

    def make(out: Path) -> None:
        merge(carryon, base=str(llama.base), out=out, device="cpu")

    copies = states_at_kills(
        root, lambda: make(root / "merged"), at=lambda _: True, into=tmp_path / "killed"
    )

    expected = plain_logits(root / "merged")
    for copy in copies:
        recover_folder(copy / "merged")
        if any((copy / "merged").iterdir()):
            assert torch.equal(plain_logits(copy / "merged"), expected)
    num_whole = sum(any((copy / "merged").iterdir()) for copy in copies)
    assert 0 < num_whole < len(copies)
    unfinished = copies[-num_whole - 1]
    make(unfinished / "merged")
    assert torch.equal(plain_logits(unfinished / "merged"), expected)
    assert [path.name for path in unfinished.iterdir()] == ["merged"]


def test_a_merge_on_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, small_disk: Path, llama: Place
) -> None:
    carryon = fit(llama, tmp_path / "run", kind="native")
    for pages in (1, 4, 9):
        resize(small_disk, pages * PAGE)
        with pytest.raises(DiskFullError, match="the disk is full while writing") as caught:
            merge(carryon, base=str(llama.base), out=small_disk / "merged", device="cpu")
        assert "\n" not in str(caught.value)
        assert list(small_disk.iterdir()) == []
    with file_size_limit(9_000), pytest.raises(DiskFullError, match="ulimit -f"):
        merge(carryon, base=str(llama.base), out=tmp_path / "merged", device="cpu")
    assert not (tmp_path / "merged").exists()


def test_a_merge_into_a_mount_point_is_refused_before_the_work(
    tmp_path: Path, small_disk: Path, llama: Place
) -> None:
    carryon = fit(llama, tmp_path / "run", kind="native")

    with pytest.raises(InputError, match="got a mount point, .* Fix: --out .*/disk/merged"):
        merge(carryon, base="no such base", out=small_disk, device="cpu")

    assert list(small_disk.iterdir()) == []
    assert not list(tmp_path.glob(".*"))


def test_a_merge_into_a_link_to_an_empty_folder_writes_there(tmp_path: Path, llama: Place) -> None:
    carryon = fit(llama, tmp_path / "run", kind="native")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    merge(carryon, base=str(llama.base), out=tmp_path / "link", device="cpu")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_bottleneck_is_not_merged(tmp_path: Path, llama: Place) -> None:
    """The error says what to do."""
    carryon = fit(llama, tmp_path / "run", width=8, intermediate_size=8)
    with pytest.raises(InputError, match="bottleneck, which cannot be merged"):
        merge(carryon, base=str(llama.base), out=tmp_path / "merged")


def test_an_adapter_needs_lora_and_its_own_base(tmp_path: Path, llama: Place) -> None:
    """And nothing is written."""
    carryon = fit(llama, tmp_path / "run", kind="top")
    with pytest.raises(InputError, match="leave out --adapter"):
        merge(carryon, base=str(llama.base), out=tmp_path / "out", adapter=True)
    other = make_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(SettingMismatchError, match="expected the weights"):
        merge(carryon, base=str(other), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_of_more_blocks_serves_fewer(tmp_path: Path) -> None:
    """The last ones; and says which taps and blocks to extract where it lacks them."""
    place = make_place(tmp_path, "llama-untied", blocks=2, taps=["layer.2"])
    carryon = fit(place, tmp_path / "run", kind="top")
    merge(carryon, base=str(place.base), out=tmp_path / "merged", device="cpu")
    logits = plain_logits(tmp_path / "merged")
    torch.testing.assert_close(logits, composed_logits(carryon, place), rtol=1e-4, atol=1e-4)
    for shape, words in (
        ({"kind": "top", "blocks": 2}, "--taps layer.2 layer.1 --with-blocks 2"),
        ({"kind": "native"}, "--taps layer.2 prenorm --with-blocks 1"),
    ):
        with pytest.raises(InputError, match=f"got layer.2. Fix: extract again with {words}$"):
            fit(place, tmp_path / "other", **shape)  # type: ignore[arg-type]


def test_blocks_are_counted_before_they_are_written(tmp_path: Path, llama: Place) -> None:
    """By a dry run."""
    actual = [
        estimate(
            plan_extraction(
                base=str(llama.base),
                data=[llama.store.parent / "data.jsonl"],
                out=tmp_path / "none",
                corpus=CORPUS,
                store=StoreSettings(unit_tokens=64, with_blocks=number),
                forward=FORWARD,
                data_settings=DataSettings(tokenizer_workers=1),
            )
        )
        for number in (0, 1)
    ]
    files = [path.stat().st_size for path in (llama.store / "blocks").iterdir()]
    sizes = [each.profiles["exact"].store_bytes for each in actual]
    assert [each.blocks_bytes for each in actual] == [0, sum(files)]
    assert 0 <= sizes[1] - sizes[0] - sum(files) < 1000  # their digests in the manifest


@pytest.mark.parametrize(("before", "now"), [(0, 1), (1, 0), (2, 1)])
def test_a_store_is_resumed_only_with_the_same_number_of_blocks(
    tmp_path: Path, before: int, now: int
) -> None:
    """The error names both numbers."""
    make_place(tmp_path, "llama-untied", blocks=before)
    text = f"with_blocks: expected {before}, .* got {now}"
    with pytest.raises(SettingMismatchError, match=text):
        make_place(tmp_path, "llama-untied", blocks=now)


def test_appended_samples_keep_the_blocks(tmp_path: Path) -> None:
    """And the store is sound afterwards."""
    place = make_place(tmp_path)
    before = (place.store / "blocks" / "0.safetensors").read_bytes()
    make_place(tmp_path, first_sample=12)
    assert (place.store / "blocks" / "0.safetensors").read_bytes() == before
    assert verify(place.store, depth="full").is_complete
    fit(place, tmp_path / "run", kind="top")


def test_more_blocks_than_there_are_is_refused(tmp_path: Path, llama: Place) -> None:
    """At extraction and at training."""
    with pytest.raises(InputError, match="with_blocks: expected 1 to 1 blocks"):
        make_place(tmp_path, blocks=3)
    with pytest.raises(InputError, match="blocks: expected 1 to 1 for the kind top"):
        resolve_taps(CarryOnSettings(kind="top", blocks=2), 2)


def test_a_store_without_blocks_is_refused(tmp_path: Path) -> None:
    """The error names the option."""
    place = make_place(tmp_path, blocks=0)
    with pytest.raises(InputError, match="--with-blocks"):
        fit(place, tmp_path / "run", kind="top")


def test_other_taps_than_the_kinds_own_are_refused(llama: Place) -> None:
    """By name."""
    settings = CarryOnSettings(kind="native", taps=["layer.1"])
    with pytest.raises(InputError, match="expected prenorm"):
        resolve_taps(settings, 2)


def test_damaged_blocks_are_noticed_and_repaired(tmp_path: Path) -> None:
    """From the base, to the same bytes."""
    place = make_place(tmp_path)
    path = place.store / "blocks" / "0.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert not verify(place.store, depth="full").is_sound
    repair(place.store, base=str(place.base), forward=FORWARD)
    assert path.read_bytes() == before


def test_a_merged_kind_is_not_compared_with_its_base_in_one_model(
    tmp_path: Path, llama: Place
) -> None:
    """It would show the customized model twice."""
    from carryon.tools.commands.generate import generate

    carryon = fit(llama, tmp_path / "run", kind="top")
    with pytest.raises(InputError, match="neither --compare nor --alpha"):
        generate(
            carryon=str(carryon),
            prompt="the",
            base=str(llama.base),
            compare=True,
            settings=GenerateSettings(),
            forward=FORWARD,
        )
