"""Settings of the compilation of training steps. Importing this loads neither torch nor numpy."""

import re
from dataclasses import dataclass
from typing import Literal

from carryon.cache.checked_settings import Settings, bounded

_MOST = 16
"""Sizes that can be given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileSettings(Settings):
    """Compilation."""

    compile: Literal["auto", True, False] = "auto"
    """Whether torch compiles the carry-on in each step, for a few sizes that batches are padded to,
    and on a GPU captures it as CUDA graphs: the same steps up to rounding. Of the kind
    `bottleneck` alone, without dropout and without settings that save memory. `auto`: as the
    run that is resumed, and false for a new one."""
    padded_sizes: list[str] = bounded([], is_unique=True)
    """Sizes of batches for `compile`, each TOKENSxROWSxLONGESTxPAIRS: tokens, samples, tokens of
    the longest sample, supervised tokens. None given: at most 4, which hold nearly all batches; a
    resumed run keeps them. A batch that no size holds is computed as it is."""

    def problems(self) -> list[tuple[bool, str]]:
        """Check the form of the sizes, and that they have an effect."""
        wrong = [each for each in self.padded_sizes if not is_size(each)]
        return [
            (
                bool(wrong),
                "padded_sizes: expected TOKENSxROWSxLONGESTxPAIRS such as 1024x16x256x800, got "
                f"{wrong[0]!a:.80}"
                if wrong
                else "",
            ),
            (
                len(self.padded_sizes) > _MOST,
                f"padded_sizes: expected at most {_MOST}, got {len(self.padded_sizes)}",
            ),
            (
                bool(self.padded_sizes) and self.compile is False,
                "padded_sizes: expected with compile, got them without. Fix: --compile true",
            ),
        ]


def is_size(text: str) -> bool:
    """Return whether a text has the form of a size: four numbers of up to 8 digits."""
    return re.fullmatch(r"\d{1,8}(x\d{1,8}){3}", text, re.ASCII) is not None
