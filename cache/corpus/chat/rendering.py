"""What a conversation is rendered to: a text with its targets, and its turns one by one."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """A text and the characters of it that are targets."""

    text: str
    targets: Sequence[tuple[int, int]] | None
    """(start, stop) of each; None: everything."""
    prompts: Sequence[int]
    """Where generation begins in `text`: no token may reach over these."""
    turn: int | None
    """Message that is learned, of one turn; None for a whole conversation."""
    notes: Sequence[str]
    """Reasons to be counted, as in report.NOTES."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """An assistant turn, behind the messages before it."""

    index: int
    """Of its message in the conversation."""
    closed: str
    """All through the turn, with its stop token."""
    start: int
    stop: int
    """The target in `closed`; what stands behind it is never generated."""
    length: int
    """Characters of `closed` that the template wrote; a stop token may be appended."""
    is_prompt_kept: bool
    """Whether `closed` begins with the whole prompt."""
    moved: int
    """Characters by which the turn stands further on in `closed` than the template wrote it."""
    is_continued: bool
    """Whether `closed` is the prompt and the message's own text, which the template cuts."""


def notes_of(turns: Sequence[Turn], targets: Sequence[Sequence[tuple[int, int]]]) -> list[str]:
    """Return the reasons to be counted of turns and their targets, as in report.NOTES."""
    opened = "turn whose prompt is not the beginning of the finished turn"
    unmarked = "turn that the chat template does not mark, not learned"
    continued = "turn with reasoning that the chat template cuts out, learned as generation has it"
    return [
        *[continued for turn in turns if turn.is_continued],
        *[opened for turn in turns if not turn.is_prompt_kept],
        *[unmarked for spans in targets if not spans],
    ]


def common_length(first: str, second: str) -> int:
    """Return the length of the common beginning of two texts."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
