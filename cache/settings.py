"""Settings of the cache: corpus, data, store, forward passes and Ray; and the names of taps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from carryon.cache.checked_settings import Settings, bounded
from carryon.cache.errors import InputError

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways by which accelerate spreads a base over devices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSettings(Settings):
    """How records become samples: recorded in the store, the same for all that it holds."""

    mask: Literal["auto", "assistant", "completion", "all"] = "auto"
    """Which tokens are training targets: `assistant` turns of `messages`, the `completion` of
    `prompt` + `completion` (of messages, the last turn), or `all` tokens. `auto` takes what fits
    each record: assistant turns, completions, and everything of a plain `text`."""
    max_tokens: int = bounded(0, at_least=0)
    """Longest sample, in tokens. 0: the base's context or the unit, whichever is smaller."""
    long: Literal["auto", "truncate", "split", "skip", "error"] = "auto"
    """What becomes of a longer sample: cut off, split into pieces, left out, or an error.
    `auto` splits plain text and cuts off all else. Counted and recorded."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned."""
    chat_template: str = ""
    """File with a Jinja chat template, used in place of the base's own. Empty: the base's own."""
    chat_template_kwargs: list[str] = bounded([])
    """Variables for the chat template, each NAME=VALUE with a JSON value or a text, such as
    enable_thinking=false. A record's own `chat_template_kwargs` come before them."""
    template_date: str = ""
    """Date, YYYY-MM-DD, that a chat template prints as today. Empty: the store's, or today."""
    start_pieces: bool = True
    """Begin each piece of a split text with the tokenizer's start tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings(Settings):
    """How data are read; the samples' fingerprint covers the result."""

    column: list[str] = bounded([])
    """Columns to read under another name, each FIELD=COLUMN, such as text=body."""
    data_config: str = ""
    """Configuration (subset) of data on the hub."""
    bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row that is no record: an error, or left out and listed in the store's
    skipped.jsonl."""
    drop_unfit: bool = False
    """Leave out, and count, a conversation whose text the chat template drops or refuses, in place
    of an error."""
    tokenizer_workers: int = bounded(0, at_least=0)
    """Processes that tokenize. 0: one a core."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings(Settings):
    """What the store holds, and how it is cut."""

    taps: list[str] = bounded(["final"], min_items=1, is_unique=True)
    """Hidden states to keep: `final` (what the head reads), `prenorm` (before the base's last
    norm), `layer.K` (after block K, counted from 1), `layer.0` (the token's embedding, as it
    enters the first block). Several in one pass are allowed."""
    profile: Literal["exact", "raw", "near", "compact"] = "exact"
    """`exact` keeps every bit; `raw` too, not compressed: larger, faster to read; `near` and
    `compact` are smaller and record their error."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored states; `near` and `compact` read back as this type."""
    unit_tokens: int = bounded(32768, at_least=16)
    """Tokens in a unit, the piece of work that is written, checked, resumed and read as one."""
    seed: int = bounded(0, at_least=0)
    """Seed of the shuffle of samples into units."""
    with_blocks: int = bounded(0, at_least=0)
    """The base's last blocks to keep beside the head, from which carry-ons of the kinds `native`
    and `top` are trained without the base. 0: none."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return whether profile and dtype fit each other."""
        return [
            (
                self.profile in ("near", "compact") and self.dtype != "bfloat16",
                f"dtype: expected bfloat16 for the profile {self.profile}, got {self.dtype}. "
                "Fix: leave out --dtype, or use --profile exact",
            )
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StoreSettings":
        """Build from plain values; errors of `Settings.from_dict`."""
        if rounded := values.get("rounded_as"):
            raise InputError(
                "store: expected one that is extended with states of its base, got a raw copy of "
                f"states that the profile {rounded} rounded. Fix: give the store that was copied"
            )
        return super(StoreSettings, cls).from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = Settings.to_dict(self)
        if not self.with_blocks:
            del values["with_blocks"]  # as in stores from before there were any
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSettings(Settings):
    """How the frozen base is run."""

    device: str = "auto"
    """`auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the base computes in. `auto`: that of the store that is resumed or extended; else
    bfloat16, or float32 where one block of the base, timed at the start, is faster in it."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention backend of transformers."""
    batch_tokens: int = bounded(4096, at_least=1)
    """Tokens in one forward pass, pads included; one longer sample still makes a batch."""
    allow_pickle: bool = False
    """Read a base's weights from pickle files, which can run code, if it has no safetensors."""
    trust_remote_code: bool = False
    """Run Python code that comes with a base; its digest is recorded. Read it first."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Quantize the base's linear layers on load, the head excepted: `nf4` (bitsandbytes), `int8`
    or `fp8` (torchao); extra quantize. Its states are those of another base."""
    device_map: str = ""
    """How a base is spread over devices: `auto`, `balanced`, `balanced_low_0`, `sequential`, or a
    JSON file of module: device (0, cuda:1, cpu or disk). Empty: all of it on --device."""
    max_memory: list[str] = bounded([])
    """Memory for the base's weights, each DEVICE=SIZE, such as 0=70GiB cpu=100GiB; the rest is
    read from disk. Empty: what is free."""
    offload_folder: str = ""
    """Folder in which weights on disk are kept that cannot be read from the base's own files.
    Removed at the end. Empty: one for temporary files."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; those that older documents lack only where they are set."""
        values = Settings.to_dict(self)
        later = ("trust_remote_code", "quantize", "device_map", "max_memory", "offload_folder")
        for name in later:
            if values[name] in (False, "none", "", []):
                del values[name]
        return values

    def problems(self) -> list[tuple[bool, str]]:
        """Return whether the options of a spread base fit each other."""
        is_planned = self.device_map in DEVICE_MAPS
        return [
            (
                bool(self.max_memory) and not is_planned,
                f"max_memory: expected a device map that is planned, got "
                f"{self.device_map or 'none'}. Fix: --device-map auto",
            ),
            (
                bool(self.offload_folder) and not self.device_map,
                "offload_folder: expected a device map, got none. Fix: --device-map auto",
            ),
            (
                bool(self.device_map) and self.device != "auto",
                f"device: expected auto beside --device-map, got {self.device}. Fix: leave out "
                "--device, or name devices in the file of --device-map",
            ),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class RaySettings(Settings):
    """How actors of Ray take part in an extraction."""

    ray_address: str = ""
    """Cluster: HOST:PORT of its head, or `auto` on one of its nodes. Empty: that of the variable
    RAY_ADDRESS, else this machine alone."""
    ray_cpus: int = bounded(0, at_least=0)
    """CPUs of an actor, which are its threads. 0: with a GPU one, else an even share for --workers,
    or all of the smallest node."""
    ray_gpus: int = bounded(1, at_least=1)
    """GPUs of an actor, where the base runs on GPUs; with --device-map it is spread over them."""


def parse_tap(name: str, *, num_layers: int) -> int | None:
    """Return K of `layer.K`, 0 for the embedding, or None for `final` and `prenorm`.

    Raises:
        InputError: no such tap in a base of `num_layers` blocks.
    """
    if name in ("final", "prenorm"):
        return None
    kind, _, number = name.partition(".")
    if kind == "layer" and number in map(str, range(num_layers + 1)):
        return int(number)
    raise InputError(
        f"tap {name!r}: this base has final, prenorm and layer.0 to layer.{num_layers}"
    )


def tap_depth(name: str, *, num_layers: int) -> int:
    """Return how many of the base's blocks a tap needs.

    Raises:
        InputError: no such tap in a base of `num_layers` blocks.
    """
    layer = parse_tap(name, num_layers=num_layers)
    return num_layers if layer is None else layer
