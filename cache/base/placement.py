"""Where the weights of a base lie: on one device, or spread over several by accelerate.

Spread weights may be in host memory or in files while they are not computed with; accelerate
copies each module's to its device before it runs.
"""

import copy
import logging
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device, get_max_memory, has_offloaded_params
from torch import Tensor, nn

from carryon.cache.base.weights.offloaded import FileWeight, kept_weight
from carryon.cache.device import pick_device
from carryon.cache.errors import InputError, MissingError, StoreError
from carryon.cache.files.documents import parse_json, read_bounded
from carryon.cache.settings import DEVICE_MAPS, ForwardSettings

logger = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}I": 1 << 10 * power for power, name in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*((?:[KMGT]I?)?)B", re.IGNORECASE)
_EXAMPLE = "0=70GiB cpu=100GiB"
_MAX_MAP_BYTES = 16 << 20

Place = int | str
"""Number of an accelerator, its name, `cpu` or `disk`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where to load the weights of a base to."""

    device_map: torch.device | str | dict[str, Place]
    """One device, a way to spread, or the place of each module."""
    max_memory: dict[Place, int] | None = None
    """Bytes for weights on each device; the rest goes to disk. None: what is free."""
    offload_parent: str | None = None
    """Folder for that of weights on disk. None: the one for temporary files."""

    @property
    def may_use_disk(self) -> bool:
        """Whether weights may be kept in files."""
        if isinstance(self.device_map, dict):
            return "disk" in self.device_map.values()
        return isinstance(self.device_map, str)


def plan_placement(forward: ForwardSettings) -> Placement:
    """Return where a base goes.

    Raises:
        InputError: a device is not there, a size is none, or the file is no device map.
        MissingError: there is no such file.
    """
    if not forward.device_map:
        return Placement(device_map=pick_device(forward.device))
    planned = forward.device_map in DEVICE_MAPS
    return Placement(
        device_map=forward.device_map if planned else _read_map(Path(forward.device_map)),
        max_memory=_parse_sizes(forward.max_memory) if forward.max_memory else None,
        offload_parent=forward.offload_folder or None,
    )


def _read_map(path: Path) -> dict[str, Place]:
    """Return the place of each module in a JSON file."""
    if not path.is_file():
        raise MissingError(
            f"--device-map: expected {', '.join(DEVICE_MAPS)} or a JSON file, got {str(path)!r}, "
            "which does not exist"
        )
    try:
        places = parse_json(read_bounded(path, max_bytes=_MAX_MAP_BYTES))
    except (ValueError, StoreError) as error:
        raise InputError(f"--device-map: {path}: expected a JSON file: {error}") from error
    if not isinstance(places, dict) or not places:
        raise InputError(f'--device-map: {path}: expected an object such as {{"": "cpu"}}')
    for place in dict.fromkeys(map(_checked, places.values(), [path] * len(places))):
        if place not in ("cpu", "disk"):
            pick_device(_device_name(place))
    return places


def _checked(place: Any, path: Path) -> Place:  # noqa: ANN401 -- of a file
    if type(place) is int and 0 <= place < 1 << 16:
        return place
    if isinstance(place, str):
        return place
    raise InputError(
        f"--device-map: {path}: expected devices such as 0, cuda:1, cpu or disk, got {place!r:.80}"
    )


def _device_name(place: Place) -> str:
    kind = torch.accelerator.current_accelerator()
    return f"{kind.type if kind else 'cuda'}:{place}" if isinstance(place, int) else place


def _parse_sizes(texts: list[str]) -> dict[Place, int]:
    """Return the bytes of each device; those not named have what is free."""
    sizes: dict[Place, int] = dict(get_max_memory())
    for text in texts:
        name, _, size = text.partition("=")
        match = _SIZE.fullmatch(size.strip())
        place = int(name) if name.isdecimal() and len(name) < 6 else name
        if match is None or (isinstance(place, str) and place not in ("cpu", "mps")):
            raise InputError(
                f"--max-memory: expected DEVICE=SIZE with a number or cpu, and a unit, such as "
                f"{_EXAMPLE}, got {text!r:.80}"
            )
        if place not in sizes:
            raise InputError(
                f"--max-memory: expected devices of this machine ({', '.join(map(str, sizes))}), "
                f"got {text!r:.80}"
            )
        sizes[place] = int(float(match[1]) * _UNITS[match[2].upper()])
    return sizes


@contextmanager
def offload_folder(placement: Placement) -> Iterator[Path | None]:
    """Make the folder of weights on disk, and remove it if loading fails; None: no disk is used.

    Raises:
        InputError: it cannot be made.
    """
    if not placement.may_use_disk:
        yield None
        return
    try:
        made = Path(tempfile.mkdtemp(prefix="carryon-offload-", dir=placement.offload_parent))
    except OSError as error:
        raise InputError(
            f"--offload-folder: expected a folder in which one can be made, got "
            f"{placement.offload_parent}: {error.strerror}"
        ) from error
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def remove_with(model: nn.Module, folder: Path) -> None:
    """Remove `folder` when the model is freed, at the latest when this process ends."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_spread(model: nn.Module) -> bool:
    """Return whether accelerate moves weights or states of a model between devices."""
    return hasattr(model, "_hf_hook")


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model reads token ids."""
    hook: Any = getattr(model, "_hf_hook", None)
    if hook is not None:
        place = hook.execution_device
        return torch.device(_device_name(place) if isinstance(place, int) else place)
    return next(model.parameters()).device


def output_device(model: nn.Module, norm: nn.Module) -> torch.device | None:
    """Return the device of the last states of a spread model, its `norm` being the last module."""
    if not is_spread(model):
        return None
    return input_device(norm if is_spread(norm) else model)


def check_ties(model: nn.Module) -> None:
    """Check that names of one tied weight, such as embedding and head, are in one place.

    Raises:
        InputError: one is kept elsewhere and the other is not, which accelerate cannot run.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in tied.items():
        owners = (model.get_submodule(each.rpartition(".")[0]) for each in (one, other))
        is_kept, is_other_kept = map(has_offloaded_params, owners)
        if is_kept != is_other_kept:
            raise InputError(
                f"--device-map: expected tied weights in one place, got {one} and {other} in two. "
                "Fix: give both modules the same device"
            )


def log_places(model: nn.Module, *, name: str) -> None:
    """Log how many bytes of a spread base lie where."""
    if not is_spread(model):
        return
    sizes: Counter[str] = Counter()
    for key, weight in model.named_parameters():  # a tied one once
        kept = kept_weight(model, key) if weight.is_meta else weight
        place = "disk" if isinstance(kept, FileWeight) else str(kept.device)
        sizes[place] += weight.numel() * weight.element_size()
    places = ", ".join(f"{size / 1e9:,.2f} GB on {place}" for place, size in sizes.items())
    logger.info(f"base {name}: weights: {places}")


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the saved tensors of a module, also of those that are not on its device now."""
    found: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        with align_module_device(child):
            own = child.state_dict(keep_vars=False)
            names = {*child._parameters, *child._buffers} & own.keys()
            found |= {f"{path}.{name}" if path else name: own[name] for name in sorted(names)}
    return {name: found[name] for name in module.state_dict()}


def copy_alone(module: nn.Module) -> nn.Module:
    """Return a copy of a small module that accelerate does not watch, with all its weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return copy.deepcopy(module)
    with align_module_device(module):
        made = copy.deepcopy(module, {id(hook): None})  # it holds the weights of the whole base
    del made._hf_hook
    alone: nn.Module = remove_hook_from_module(made)
    return alone


def refuse_spread(model: nn.Module, *, what: str) -> None:
    """Refuse to change the blocks of a base whose weights are elsewhere.

    Raises:
        InputError: it is spread.
    """
    if is_spread(model):
        raise InputError(
            f"{what}: expected a base on one device, got one that is spread over several. Fix: "
            "leave out --device-map"
        )
