"""What a table of benchmarks says of each: where it is, what it measures, what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark, imported when it runs."""

    place: str
    """`file:function` of this folder, called with a Job and with sizes by keyword."""
    about: str
    """One line for the list."""
    needs: Literal["", "base", "store", "stores", "gpu", "gpu and base"] = ""
    """Input without which it is skipped; a base provides a store, by extracting text. `stores`: of
    two bases, which none provides. `gpu`: an accelerator of this machine."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Sizes with which it shows in seconds that it runs; its figures then mean nothing."""
