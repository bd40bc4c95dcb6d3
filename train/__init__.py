"""Train carry-ons from a store, without the base, and run them on top of it.

The names below are the public ones; they are imported when they are first used, so that
`import carryon.train` loads neither torch nor transformers. Everything deeper is internal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carryon.train.config import TrainSettings
    from carryon.train.continual.lineage import update
    from carryon.train.data.store_dataset import StoreDataset
    from carryon.train.inference.evaluate import evaluate
    from carryon.train.inference.merge import merge
    from carryon.train.inference.modeling import CarryOnForCausalLM
    from carryon.train.trainer.sweep import sweep
    from carryon.train.trainer.trainer import train

__all__ = [
    "CarryOnForCausalLM",
    "StoreDataset",
    "TrainSettings",
    "evaluate",
    "merge",
    "sweep",
    "train",
    "update",
]

_MODULES = {
    "CarryOnForCausalLM": "inference.modeling",
    "StoreDataset": "data.store_dataset",
    "TrainSettings": "config",
    "evaluate": "inference.evaluate",
    "merge": "inference.merge",
    "sweep": "trainer.sweep",
    "train": "trainer.trainer",
    "update": "continual.lineage",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- functions and classes
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
