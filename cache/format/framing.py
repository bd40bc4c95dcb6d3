"""Framing: how the texts of a store stood before the base, so that generation can do the same.

Conversations went through a chat template; prompts, completions and texts stood as they are,
behind the tokenizer's start tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from carryon.cache.format.manifest import Manifest

MAX_TEMPLATE_CHARS = 1 << 20
_RAW = ("prompt and completion", "text")
_KEYS = ("chat_template", "chat_template_kwargs", "template_date")


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How texts were put before the base."""

    kinds: Mapping[str, int] = field(default_factory=dict)
    """Samples of each kind of record. Empty: not known."""
    chat_template: str = ""
    """Text of the chat template, if another than the base's own was used."""
    chat_template_sha256: str | None = None
    """Of the chat template that was used. None: there was none."""
    chat_template_kwargs: Sequence[str] = ()
    """Its variables, each NAME=VALUE."""
    template_date: str = ""
    """Date, YYYY-MM-DD, that it printed as today; empty: none."""

    @property
    def is_chat(self) -> bool | None:
        """Whether most samples went through the chat template; None: not known."""
        if not self.kinds:
            return None
        num_raw = sum(self.kinds.get(kind, 0) for kind in _RAW)
        return 2 * num_raw <= sum(self.kinds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {
            "kinds": dict(self.kinds),
            "chat_template_kwargs": list(self.chat_template_kwargs),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Framing":
        """Check and build; missing keys have their defaults.

        Raises:
            InputError: a key is unknown, or a value of another type or too long.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"framing: expected an object, got {type(values).__name__}")
        if unknown := sorted(map(str, set(values) - {item.name for item in fields(cls)})):
            raise InputError(f"framing: unknown key {unknown[0]!a}")
        framing = cls(**values)
        texts = [framing.chat_template, framing.template_date, framing.chat_template_sha256 or ""]
        if not isinstance(framing.chat_template_kwargs, list | tuple):
            raise InputError("framing: chat_template_kwargs: expected a list")
        for text in (*texts, *framing.chat_template_kwargs):
            if not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARS:
                raise InputError(
                    f"framing: expected texts of at most {MAX_TEMPLATE_CHARS} characters"
                )
        if not isinstance(framing.kinds, Mapping) or not all(
            isinstance(kind, str) and type(count) is int for kind, count in framing.kinds.items()
        ):
            raise InputError("framing: kinds: expected whole numbers by name")
        return replace(framing, chat_template_kwargs=tuple(framing.chat_template_kwargs))


def framing_of(manifest: "Manifest") -> Framing:
    """Return how the texts of a store were framed; of an old store the kinds are not known."""
    kinds: Counter[str] = Counter()
    for part in manifest.parts:
        kinds.update(part.kinds)
    is_known = all(part.kinds for part in manifest.parts)
    return Framing.from_dict(
        {
            "kinds": dict(kinds) if is_known else {},
            "chat_template_sha256": manifest.base.get("chat_template_sha256"),
            **{key: manifest.corpus[key] for key in _KEYS if manifest.corpus.get(key)},
        }
    )


def merge_framings(framings: Sequence[Framing]) -> Framing:
    """Return the framing of several stores: samples of all, and the chat template of the first."""
    kinds: Counter[str] = Counter()
    for framing in framings:
        kinds.update(framing.kinds)
    is_known = all(framing.kinds for framing in framings)
    return replace(framings[0], kinds=dict(kinds) if is_known else {})
