"""Make and read stores of a frozen base's hidden states. Nothing here trains.

These names are the public ones, imported when first used: opening a store loads neither torch nor
transformers. Folders, from the ground up: base and corpus, format, store, extraction.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carryon.cache.errors import CarryOnError
    from carryon.cache.extraction.pipeline import extract
    from carryon.cache.extraction.repair import repair
    from carryon.cache.settings import (
        CorpusSettings,
        DataSettings,
        ForwardSettings,
        RaySettings,
        StoreSettings,
    )
    from carryon.cache.store.reader import Store
    from carryon.cache.store.verify import verify

__all__ = [
    "CarryOnError",
    "CorpusSettings",
    "DataSettings",
    "ForwardSettings",
    "RaySettings",
    "Store",
    "StoreSettings",
    "extract",
    "repair",
    "verify",
]
_MODULES = {
    "CarryOnError": "errors",
    "CorpusSettings": "settings",
    "DataSettings": "settings",
    "ForwardSettings": "settings",
    "RaySettings": "settings",
    "Store": "store.reader",
    "StoreSettings": "settings",
    "extract": "extraction.pipeline",
    "repair": "extraction.repair",
    "verify": "store.verify",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
