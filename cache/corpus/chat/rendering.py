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
