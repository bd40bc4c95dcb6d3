"""A carry-on on disk: weights in safetensors, everything else in one JSON, and a model card.

Nothing is pickled, and no file names a Python class. The folder names its base by the base's
digests, not by a path. The card holds the SHA-256 of the weights and of itself; both are compared
before a module is built.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.atomic import recover_folder, whole_file, whole_folder, write_file
from carryon.cache.files.documents import write_json
from carryon.cache.files.tensor_files import digest_tensors
from carryon.cache.format.manifest import sha256_hex
from carryon.cache.store.top_blocks import Blocks
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import BUILT_IN
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_checks import check_sizes, check_weights
from carryon.train.modules.card_file import (
    CARD,
    GATE,
    README,
    WEIGHTS,
    check_digest,
    read_signed,
    signed,
)
from carryon.train.modules.carryon import CarryOn, make_carryon
from carryon.train.modules.model_card import model_card
from carryon.train.modules.taps import check_alpha
from carryon.train.modules.undrawn import Undrawn


def save_carryon(
    folder: str | Path,
    carryon: CarryOn,
    card: CarryOnCard,
    *,
    dtype: torch.dtype,
    gate: nn.Module | None = None,
) -> int:
    """Write a carry-on to `folder` atomically, replacing an existing one.

    Args:
        folder: appears complete or not at all.
        carryon: the module.
        card: its facts.
        dtype: of the saved weights; bfloat16 halves the file and rounds each weight to 8 bits.
        gate: of a mixture, saved in float32. None: there is none.

    Returns:
        Bytes of the weights, without a gate's.
    """
    with whole_folder(Path(folder)) as partial:
        if gate is not None:
            weights = {name: weight.cpu() for name, weight in gate.state_dict().items()}
            save_file(weights, partial / GATE, metadata={"format": "pt"})
        return write_carryon_files(
            partial, carryon.state_dict(), card, dtype=dtype, is_synced=False
        )


def write_carryon_files(
    folder: Path,
    weights: Mapping[str, Tensor],
    card: CarryOnCard,
    *,
    dtype: torch.dtype,
    is_synced: bool = True,
) -> int:
    """Write each file of a carry-on into `folder` atomically; other files there stay.

    Arguments and result as those of `save_carryon`; `is_synced` as that of `write_file`.
    """
    saved = {
        name: weight.detach().to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        for name, weight in weights.items()
    }
    with whole_file(folder / WEIGHTS, is_synced=is_synced) as partial:
        save_file(saved, partial, metadata={"format": "pt"})
    _write_card(folder, card, digest=digest_tensors(folder / WEIGHTS), is_synced=is_synced)
    return (folder / WEIGHTS).stat().st_size


def write_alpha(folder: str | Path, alpha: float) -> None:
    """Make `alpha` the default strength of the carry-on in `folder`, and sign the card again.

    Raises:
        MissingError: there is no carry-on.
        InputError: a file is damaged, or alpha is out of range.
    """
    root = Path(folder)
    card, digest = _check_carryon(root)
    _write_card(
        root,
        replace(card, alpha=check_alpha(alpha)),
        digest=digest or digest_tensors(root / WEIGHTS),
    )


def check_carryon(folder: str | Path) -> None:
    """Compare the card and the weights of a carry-on with their digests; raises as `read_weights`.

    No module is built.
    """
    _check_carryon(Path(folder))


def _check_carryon(root: Path) -> tuple[CarryOnCard, str | None]:
    card, digest = _read_card(root)
    check_digest(root / WEIGHTS, digest)
    if card.has_gate:
        check_digest(root / GATE, read_signed(root / CARD)[1].get(GATE, ""))
    return card, digest


def _write_card(folder: Path, card: CarryOnCard, *, digest: str, is_synced: bool = True) -> None:
    """Write the card's form for people, then the card with the digests of the other files."""
    num_bytes = (folder / WEIGHTS).stat().st_size
    text = model_card(card.without_paths().to_dict(), num_bytes=num_bytes).encode()
    write_file(folder / README, text, is_synced=is_synced)
    files = {WEIGHTS: digest, README: sha256_hex(text)}
    if card.has_gate:
        files[GATE] = digest_tensors(folder / GATE)
    document = signed(card.to_dict(), files=files)
    write_json(folder / CARD, document, is_synced=is_synced)


def locate_carryon(source: str | Path, **download: Any) -> Path:  # noqa: ANN401 -- of the hub
    """Return the local folder of a carry-on, downloaded if `source` is a hub id.

    Args:
        source: a folder, `name/repo` or `name/repo@revision`.
        download: revision, token, cache_dir, ...: as in `huggingface_hub.snapshot_download`.

    Raises:
        MissingError: there is no such folder, and no such repository on the hub.
    """
    path = Path(source).expanduser()
    recover_folder(path)
    name, _, revision = str(source).partition("@")
    is_path = path.is_absolute() or str(source).startswith(".") or name.count("/") != 1
    if path.is_dir() or is_path:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if revision:
        download = download | {"revision": revision}
    try:
        return Path(
            snapshot_download(name, allow_patterns=[CARD, WEIGHTS, GATE, README], **download)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise MissingError(
            f"{source}: expected the folder of a carry-on, or its id on a hub; the download "
            f"failed: {reason}. Fix: run carryon train, which writes one to RUN/carryon"
        ) from error


def read_card(
    folder: str | Path, *, allow_mixture: bool = False, allow_states: bool = False
) -> CarryOnCard:
    """Return the card of the carry-on in `folder`; raises as `load_carryon` does.

    Args:
        folder: of the carry-on.
        allow_mixture: also return the card of one that is mixed with other bases, which its own
            base alone is not enough for.
        allow_states: also if it reads their states.
    """
    card = _read_card(Path(folder))[0]
    if card.source_widths and not allow_states:
        others = ", ".join(source["base"] for source in card.mixture["sources"])
        raise InputError(
            f"{folder}: expected a carry-on that reads the states of one base, got one that also "
            f"reads those of {others}, which only carryon train and evaluate give it so far. Fix: "
            "carryon evaluate --mix STORE, or train with --mix-by probability"
        )
    if card.mixture and not allow_mixture:
        others = ", ".join(source["base"] for source in card.mixture["sources"])
        raise InputError(
            f"{folder}: expected a carry-on of one base, got a mixture of several bases, which "
            f"needs {others} too. Fix: carryon evaluate --mix STORE, carryon generate, or train "
            "one without --mix"
        )
    return card


def _read_card(root: Path) -> tuple[CarryOnCard, str | None]:
    """Return the card, and the SHA-256 that it records of the weights; None in an old one."""
    recover_folder(root)
    if not (root / CARD).exists() or not (root / WEIGHTS).exists():
        inner = root / "carryon"
        fix = "run carryon train, which writes one to RUN/carryon"
        if (inner / CARD).is_file():  # the run was given
            fix = f"give {inner}"
        raise MissingError(
            f"{root}: expected a carry-on ({CARD} and {WEIGHTS}), found none. Fix: {fix}"
        )
    values, files = read_signed(root / CARD)
    try:
        card = CarryOnCard.from_dict(values)
    except InputError as error:
        raise _not_a_carryon(root, error) from error
    if not card.has_gate and os.path.lexists(root / GATE):
        raise InputError(
            f"{root / GATE}: expected a card that names the other bases of the gate, got one of a "
            "single base, which would answer without it. Fix: download the carry-on again, or "
            "delete the gate"
        )
    return card, files.get(WEIGHTS)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the weights of the carry-on in `folder`, on the CPU, in their saved dtype.

    Raises:
        InputError: the file is damaged, or does not match the digest in the card.
    """
    root = Path(folder)
    check_carryon(root)
    try:
        with torch.device("cpu"):  # the caller's default may be another
            return load_file(root / WEIGHTS)
    except (SafetensorError, ValueError, KeyError) as error:  # or a dtype that torch lacks
        raise _not_a_carryon(root, error) from error


def load_carryon(
    folder: str | Path,
    *,
    blocks: Callable[[], Blocks] | None = None,
    allow_mixture: bool = False,
    allow_states: bool = False,
) -> tuple[CarryOn, CarryOnCard]:
    """Return the carry-on in `folder`, weights in float32 on the CPU, and its card.

    Args:
        folder: of the carry-on.
        blocks: reads the last blocks of its base, for a kind that needs them.
        allow_mixture: also return one with a gate, without its gate (`load_mixture`).
        allow_states: also return one that reads the states of other bases.

    Raises:
        MissingError: there is no carry-on.
        InputError: a file is damaged, the blocks are missing, or it is a mixture.
    """
    card = read_card(folder, allow_mixture=allow_mixture, allow_states=allow_states)
    weights = read_weights(folder)

    def read_blocks() -> Blocks:
        if blocks is None:
            raise InputError(
                f"kind {card.settings['kind']}: expected its base, whose blocks it needs. "
                f"Fix: make a checkpoint with carryon merge --carryon {folder}"
            )
        return blocks()

    try:
        settings = CarryOnSettings.from_dict(card.settings)
        sources = card.source_widths
        check_sizes(settings, card.base_width, weights, source_widths=sources.values())
        # A kind of the user's own may compute something from what it draws.
        drawing = Undrawn() if settings.kind in BUILT_IN else nullcontext()
        with torch.device("cpu"), drawing:
            carryon = make_carryon(
                settings, base_width=card.base_width, blocks=read_blocks, sources=sources
            )
        check_weights(weights, carryon.state_dict())
        carryon.load_state_dict(weights)  # widens in place: no second copy in memory
    except (RuntimeError, InputError) as error:
        raise _not_a_carryon(Path(folder), error) from error
    return carryon.eval(), card


def _not_a_carryon(root: Path, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:500]
    return InputError(f"{root}: expected a carry-on as carryon train writes it: {reason}")
