"""Settings of an extraction by vLLM; loads nothing large."""

import json
import re
from dataclasses import dataclass
from typing import Any

from carryon.cache.checked_settings import Settings, bounded
from carryon.cache.errors import InputError

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_OWN = (
    "model",
    "revision",
    "dtype",
    "speculative_config",
    "kv_transfer_config",
    "trust_remote_code",
    "skip_tokenizer_init",
)
_MEASURED = ("enable_prefix_caching", "enable_chunked_prefill")
MEASURED_VERSIONS = ("0.32",)
"""Of vLLM, in which states with `_MEASURED` were compared with those without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmSettings(Settings):
    """How vLLM is run or asked."""

    vllm_python: str = ""
    """Python of the environment that has vLLM. Empty: that of the environment variable
    CARRYON_VLLM_PYTHON, or this one."""
    vllm_args: list[str] = bounded([])
    """Arguments of vLLM's engine, each NAME=VALUE with a JSON value or a text, such as
    tensor_parallel_size=2."""
    requests: int = bounded(64, at_least=1, at_most=4096)
    """Most requests in flight, and files of states that wait to be packed."""
    retries: int = bounded(5, at_least=0, at_most=100)
    """Times that a request to --endpoint is sent again, after longer and longer waits."""
    request_timeout_s: float = bounded(600.0, above=0.0)
    """Seconds until a request without an answer, or without its file, has failed."""
    states_folder: str = ""
    """Folder of an --endpoint's files, its shared_storage_path, as this machine sees it."""
    layer_ids: list[int] = bounded([])
    """Layer ids that an --endpoint was given. Empty: those that its files name."""
    max_error: float = bounded(0.15, above=0.0, at_most=0.45)
    """Largest relative error of a layer against this base, of 8 samples, each channel by its RMS.
    bfloat16 on both sides gives 0.01 to 0.06."""


def parse_engine_args(words: list[str]) -> dict[str, Any]:
    """Return the arguments of vLLM's engine by name.

    Raises:
        InputError: one is not NAME=VALUE, or is set by this package.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise InputError(
                f"--vllm-args: expected NAME=VALUE, got {word!a:.80}. Fix: --vllm-args "
                "tensor_parallel_size=2"
            )
        if name in _OWN:
            raise InputError(
                f"--vllm-args: expected arguments that the extraction does not set, got {name}. "
                "Fix: leave it out; --base, --taps, --compute-dtype set these"
            )
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def check_measured(args: dict[str, Any], *, version: str) -> None:
    """Check that what may change states is on only where it was measured not to.

    Args:
        args: of the engine.
        version: of vLLM.

    Raises:
        InputError: a prefix cache or chunked prefill is on in another version.
    """
    if is_measured(version):
        return
    if used := [name for name in _MEASURED if args.get(name)]:
        raise InputError(
            f"--vllm-args: expected {used[0]} only with vLLM {' or '.join(MEASURED_VERSIONS)}, "
            f"where states with it were measured, got {version!a:.40}. Fix: leave it out"
        )


def is_measured(version: str) -> bool:
    """Return whether this is a version of vLLM whose states were compared."""
    return version.startswith(tuple(f"{each}." for each in MEASURED_VERSIONS))
