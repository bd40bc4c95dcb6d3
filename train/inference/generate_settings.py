"""Settings of generation; loads nothing large."""

from dataclasses import dataclass
from typing import Literal

from carryon.cache.checked_settings import Settings, bounded

ChatChoice = Literal["auto", True, False]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSettings(Settings):
    """Generation."""

    max_new_tokens: int = bounded(256, at_least=1)
    """Maximum length of an answer, in tokens."""
    temperature: float = bounded(0.0, at_least=0)
    """Sampling temperature. 0: greedy."""
    top_p: float = bounded(1.0, above=0, at_most=1)
    """Nucleus sampling: sample from the most probable tokens up to this sum of probabilities."""
    seed: int = bounded(0, at_least=0)
    """Seed of sampling."""
    chat: ChatChoice = "auto"
    """Whether the prompt goes into the chat template, as a user turn, or stands as it is. `auto`:
    as the carry-on's training texts did; if that is not known, where the base has a template."""
    chat_template_kwargs: list[str] = bounded([])
    """Variables for the chat template, each NAME=VALUE, such as enable_thinking=false. Empty: those
    of the carry-on's training texts, or none."""

    @property
    def template_facts(self) -> dict[str, list[str]]:
        """What a file of answers keeps of the chat template; older files have nothing."""
        given = self.chat_template_kwargs
        return {"chat_template_kwargs": given} if given else {}

    def problems(self) -> list[tuple[bool, str]]:
        """Return what the settings may not be together."""
        return [
            (
                self.top_p < 1 and not self.temperature,
                f"top_p: expected 1 for greedy answers, got {self.top_p:g}. Fix: --temperature 0.8",
            )
        ]
