"""Convert a base in a .gguf file to a transformers folder that is known as the same base.

Weights are unpacked to bfloat16, as loading the .gguf file does. The folder is read back and its
digests compared before it gets its name; a killed conversion leaves nothing under that name.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.identity import digest_all_but_weights, digest_weights
from carryon.cache.base.loading import (
    CONVERSION,
    read_checkpoint_dtype,
    read_config,
    read_model,
    read_tokenizer,
)
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.base.source.location import BaseSource, locate_base
from carryon.cache.errors import InputError
from carryon.cache.files.atomic import whole_folder
from carryon.cache.files.documents import write_json
from carryon.cache.files.new_folder import refuse_content, replaceable

logger = logging.getLogger(__name__)
_STEPS = 4


def convert_base(source: str | Path, *, out: str | Path) -> dict[str, Any]:
    """Write the base in a .gguf file as the folder `out`, atomically, and log each step.

    Args:
        source: the .gguf file.
        out: a new or empty folder, or a link to one.

    Returns:
        `base`, `out`, `parameters`, `bytes` (of all files), `elapsed_s`, and the digests of
        weights, config, tokenizer and chat template.

    Raises:
        InputError: `source` is no .gguf file, transformers cannot load it or reads the folder
            differently, or `out` is not empty.
        MissingError: there is no such file.
        MissingExtraError: the package gguf is not installed.
        DiskFullError: no space left; nothing of the folder remains.
        StoreBusyError: another process is writing `out`.
    """
    started_at = time.monotonic()
    place = locate_base(str(source))
    if place.gguf_file is None:
        raise InputError(
            f"{source}: expected a .gguf file, got a base that needs no conversion. Fix: "
            f"--base {source}"
        )
    target = replaceable(Path(out), name="converted")
    with whole_folder(target) as partial:
        refuse_content(target, out)  # of another process that ended since
        facts = write_base(place, partial)
    return {
        "base": str(source),
        "out": str(out),
        **facts,
        "bytes": sum(path.stat().st_size for path in target.iterdir()),
        "elapsed_s": round(time.monotonic() - started_at, 1),
    }


def write_base(place: BaseSource, folder: Path) -> dict[str, Any]:
    """Fill an empty folder with the base in a .gguf file; return its digests and `parameters`.

    Raises:
        InputError: transformers cannot load the base, or reads the folder differently.
    """
    _log(1, f"reading the tokenizer of {place.gguf_file}")
    tokenizer = read_tokenizer(place)
    tokenizer.save_pretrained(folder)
    _log(2, "unpacking the weights to bfloat16")
    model = _read_weights(place)
    digests = {
        "weights_sha256": digest_weights(model),
        **digest_all_but_weights(model.config, tokenizer),
    }
    parameters = sum(weight.numel() for weight in model.parameters())
    write_json(folder / CONVERSION, {"converted_from": place.gguf_file, **digests})
    _log(3, f"writing {parameters / 1e6:,.1f} M weights")
    model.save_pretrained(folder)
    del model
    _log(4, "reading the folder back and comparing")
    _compare(folder, tokenizer, expected=digests)
    return {"parameters": parameters, **digests}


def _read_weights(place: BaseSource) -> PreTrainedModel:
    return read_model(
        place,
        dtype=read_checkpoint_dtype(place),
        device=torch.device("cpu"),
        attention="sdpa",
        shows_progress=True,
    )


def _compare(folder: Path, tokenizer: Tokenizer, *, expected: Mapping[str, str | None]) -> None:
    """Check that the folder is loaded as the base that was written."""
    place = locate_base(str(folder))
    again = read_tokenizer(place)
    got = {
        "weights_sha256": digest_weights(_read_weights(place)),
        **digest_all_but_weights(read_config(place), again),
    }
    special = [(each.bos_token_id, each.eos_token_id) for each in (tokenizer, again)]
    differing = [
        name.removesuffix("_sha256") for name, digest in expected.items() if got[name] != digest
    ]
    differing += ["special tokens"] * (special[0] != special[1])
    if differing:
        raise InputError(
            f"converted base: expected transformers to read the {differing[0].replace('_', ' ')} "
            "of the .gguf file back from the folder, got another; nothing was kept. Fix: give the "
            ".gguf file itself with --base"
        )


def _log(step: int, what: str) -> None:
    logger.info(f"convert {step}/{_STEPS}: {what}")
