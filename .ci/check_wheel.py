"""Use the public API of an installed wheel from outside the checkout: check_wheel.py WHEEL BASE."""

import importlib.util
import sys
from pathlib import Path

WHEEL, BASE = Path(sys.argv[1]).resolve(), sys.argv[2]
TEXTS = [{"text": f"the thing in the {number}th line " * 4} for number in range(40)]


def forget_the_checkout() -> None:
    """Remove an editable install from the path; it would supply files that the wheel lacks."""
    sys.meta_path[:] = [each for each in sys.meta_path if "Editable" not in repr(each)]
    sys.path[:] = [each for each in sys.path if "__editable__" not in each]


def check_files() -> None:
    """Check that the package comes from the wheel, which holds no benchmarks."""
    import carryon.tools.cli.main

    assert Path(carryon.tools.cli.main.__file__).is_relative_to(WHEEL), carryon.tools.cli.main
    assert importlib.util.find_spec("carryon.tools.bench") is None, "the wheel holds tools/bench"
    assert not list(WHEEL.rglob("bench")), "the wheel holds a folder of benchmarks"
    assert (WHEEL / "carryon/train/presets/1mb.yaml").is_file(), "the wheel lacks the presets"


def check_imports() -> None:
    """Check that the public names are listed and load nothing large."""
    import carryon.cache
    import carryon.train
    from carryon.cache import Store

    assert callable(Store.open)
    assert dir(carryon.cache)
    assert dir(carryon.train)
    large = {"torch", "transformers"} & set(sys.modules)
    assert not large, f"carryon.cache and carryon.train load {large}"


def check_api() -> None:
    """Extract, open, read, train, evaluate, and generate."""
    from carryon.cache import Store, extract, verify
    from carryon.train import CarryOnForCausalLM, StoreDataset, evaluate, train

    extract(base=BASE, data=TEXTS, out="store", unit_tokens=512)
    store = Store.open("store")
    assert len(store) == len(TEXTS)
    assert store[3].hidden["final"].shape == (len(store[3].tokens), store.width)
    assert verify("store").is_complete
    assert next(iter(StoreDataset("store", batch_tokens=256)))["input_ids"].numel()
    report = train("store", out="run", epochs=1)
    assert report.carryon_nll < report.base_nll
    assert evaluate("store", carryon=report.carryon).base_nll == report.base_nll
    model = CarryOnForCausalLM.from_pretrained(report.carryon)
    inputs = model.tokenizer("the thing", return_tensors="pt")
    assert len(model.generate(**inputs, max_new_tokens=4)[0]) > len(inputs["input_ids"][0])


if __name__ == "__main__":
    forget_the_checkout()
    check_files()
    check_imports()
    check_api()
    print("the wheel: no benchmarks, light imports, the public API works")
