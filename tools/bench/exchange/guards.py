"""Wrong files of hidden states, each of which an import must refuse."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from carryon.cache.base.model import Base
from carryon.cache.errors import CarryOnError
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.exchange.state_files import (
    LAYERS,
    make_tokens,
    write_data_set,
    write_states,
)
from carryon.tools.bench.job import Job

NUM_FILES = 6
Change = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrong:
    """One thing that is wrong with files or options."""

    says: str
    """Part of the error."""
    change: Change | None = None
    """Made to one file. None: none is changed."""
    layers: tuple[int, ...] = LAYERS
    """Of the files."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ImportSettings, in place of the right ones."""
    is_data_set: bool = False
    """Whether the files are those of a data set's rows."""
    file: str = "request-3.safetensors"
    """That is changed, and that the error names; of a data set hs_3."""
    names_file: bool = True


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Return the change of a file's tensors."""

    def apply(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file({name: values.contiguous() for name, values in tensors.items()}, path)

    return apply


def edit_header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Return the change of a file's header; the bytes of its tensors stay."""

    def apply(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return edit(lambda tensors: tensors.update({name: make(tensors[name])}))


def _with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(states: torch.Tensor) -> torch.Tensor:
        states[2, 1, 3] = value
        return states

    return change


def _other_token(tokens: torch.Tensor) -> torch.Tensor:
    tokens[1] = 3 if tokens[1] != 3 else 4
    return tokens


def _repeat_column(states: torch.Tensor) -> torch.Tensor:
    states[:, 2] = states[:, 1]
    return states


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def _overlap(header: dict[str, Any]) -> None:
    for name in ("hidden_states", "token_ids"):
        first, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [0, stop - first]


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _remove(path: Path) -> None:
    path.unlink()


def _add_99(path: Path) -> None:
    os.link(path, path.with_name("hs_99.safetensors"))


def _take_4(path: Path) -> None:
    shutil.copyfile(path.with_name("hs_4.safetensors"), path)


def _length(number: int) -> Change:
    return lambda path: path.write_bytes(number.to_bytes(8, "little") + path.read_bytes()[8:])


def _entry(name: str, **values: Any) -> Change:  # noqa: ANN401
    return edit_header(lambda header: header[name].update(values))


_STATES, _TOKENS = "hidden_states", "token_ids"
WRONG: dict[str, Wrong] = {
    "id out of range": Wrong(options={"layer_ids": [0, 1, 3]}, says="0 to 2", names_file=False),
    "id below zero": Wrong(options={"layer_ids": [-1, 1, 2]}, says="0 to 2", names_file=False),
    "ids not sorted": Wrong(options={"layer_ids": [1, 0, 2]}, says="ascending", names_file=False),
    "ids repeated": Wrong(options={"layer_ids": [1, 1, 2]}, says="each once", names_file=False),
    "no ids": Wrong(options={"layer_ids": []}, says="--layer-ids", names_file=False),
    "too few ids": Wrong(options={"layer_ids": [0, 2]}, says="columns", names_file=False),
    "another layer's id": Wrong(
        layers=(0, 2), options={"layer_ids": [0, 1]}, says="layer.1", names_file=False
    ),
    "prenorm said to be a layer": Wrong(
        layers=(1, 2), options={"layer_ids": [0, 1]}, says="for layer.1", names_file=False
    ),
    "final without prenorm": Wrong(
        layers=(0, 1),
        options={"layer_ids": [0, 1], "taps": ["final"]},
        says="final",
        names_file=False,
    ),
    "tap that no column holds": Wrong(
        layers=(1, 2),
        options={"layer_ids": [1, 2], "taps": ["layer.0"]},
        says="layer.0",
        names_file=False,
    ),
    "equal columns": Wrong(change=_set(_STATES, _repeat_column), says="equal columns 1 and 2"),
    "NaN": Wrong(change=_set(_STATES, _with_value(float("nan"))), says="token 2 in column 1"),
    "infinity": Wrong(change=_set(_STATES, _with_value(float("-inf"))), says="finite"),
    "fewer states than tokens": Wrong(
        change=_set(_STATES, lambda states: states[:-1]), says="prefix cach"
    ),
    "a column less": Wrong(change=_set(_STATES, lambda states: states[:, :2]), says="columns"),
    "another width": Wrong(change=_set(_STATES, lambda states: states[..., :8]), says="width"),
    "states without layers": Wrong(
        change=_set(_STATES, lambda states: states[:, 0]), says="[tokens, layers, width]"
    ),
    "another dtype": Wrong(change=_set(_STATES, lambda states: states.float()), says="dtype"),
    "no tokens": Wrong(
        change=edit(lambda tensors: tensors.update({n: v[:0] for n, v in tensors.items()})),
        says="shape",
    ),
    "whole numbers as states": Wrong(
        change=_set(_STATES, lambda states: states.int()), says="BF16"
    ),
    "token id of no base": Wrong(
        change=_set(_TOKENS, lambda tokens: tokens + 300), says="expected 0 to"
    ),
    "token id below zero": Wrong(change=_set(_TOKENS, lambda tokens: -tokens), says="expected 0"),
    "token ids with a fraction": Wrong(
        change=_set(_TOKENS, lambda tokens: tokens.float()), says="whole numbers"
    ),
    "no states": Wrong(
        change=edit(lambda tensors: tensors.pop(_STATES) is None), says="no hidden_states"
    ),
    "no token ids": Wrong(
        change=edit(lambda tensors: tensors.pop(_TOKENS) is None), says="no token_ids"
    ),
    "a tensor of another meaning": Wrong(
        change=edit(lambda tensors: tensors.update(hidden_states_scale=torch.ones(3))),
        says="hidden_states_scale",
    ),
    "loss mask of another length": Wrong(
        change=edit(lambda tensors: tensors.update(loss_mask=torch.ones(2))), says="loss_mask"
    ),
    "a path as a tensor's name": Wrong(
        change=edit(lambda tensors: tensors.update({"../../evil": torch.ones(1)})), says="evil"
    ),
    "cut off": Wrong(change=_cut, says="cut off"),
    "longer than its header tells": Wrong(change=_lengthen, says="no tensor has"),
    "empty": Wrong(change=lambda path: path.write_bytes(b""), says="cut off"),
    "no safetensors": Wrong(change=lambda path: path.write_bytes(b"x" * 99), says="cut"),
    "a header of 4 EB": Wrong(change=_length(1 << 62), says="cut off"),
    "a header of nothing": Wrong(change=_length(0), says="damaged header"),
    "a header that is a list": Wrong(
        change=lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"),
        says="damaged header",
    ),
    "a header nested deeply": Wrong(
        change=lambda path: path.write_bytes((90000).to_bytes(8, "little") + b"[" * 90000),
        says="damaged header",
    ),
    "a shape of 2^47": Wrong(change=_entry(_STATES, shape=[1 << 47, 3, 16]), says="does not fill"),
    "a negative shape": Wrong(change=_entry(_STATES, shape=[-1, 3, 16]), says="whole numbers"),
    "a shape with a fraction": Wrong(change=_entry(_STATES, shape=[1.5, 3, 16]), says="whole"),
    "offsets beyond the file": Wrong(
        change=_entry(_STATES, data_offsets=[0, 1 << 40]), says="does not fill"
    ),
    "offsets backwards": Wrong(change=_entry(_TOKENS, data_offsets=[8, 0]), says="does not fill"),
    "tensors that overlap": Wrong(
        change=edit_header(_overlap),
        says="overlaps or gaps",
    ),
    "a dtype that nobody knows": Wrong(change=_entry(_STATES, dtype="F8_E4M3"), says="dtype"),
    "layer ids that differ": Wrong(
        change=edit_header(lambda header: header.update(__metadata__={"layer_ids": "0 2"})),
        says="layer ids",
    ),
    "layer ids of no numbers": Wrong(
        change=edit_header(lambda header: header.update(__metadata__={"layer_ids": "a"})),
        says="layer_ids",
    ),
    "a link": Wrong(change=_link, says="a link"),
    "a folder": Wrong(change=_to_folder, says="a folder"),
    "a pipe": Wrong(change=_to_pipe, says="a named pipe"),
    "a file removed, its lock left": Wrong(
        change=lambda path: path.rename(f"{path}.lock"), says="never written"
    ),
    "a row without its file": Wrong(
        change=_remove, is_data_set=True, says="got none", file="hs_3.safetensors"
    ),
    "a file without its row": Wrong(
        change=_add_99,
        is_data_set=True,
        says="hs_99",
        file="hs_3.safetensors",
        names_file=False,
    ),
    "another row's file": Wrong(
        change=_take_4,
        is_data_set=True,
        says="row 3",
        file="hs_3.safetensors",
    ),
    "token ids of another text": Wrong(
        change=_set(_TOKENS, _other_token),
        is_data_set=True,
        says="at token 1",
        file="hs_3.safetensors",
    ),
    "a loss mask other than the row's": Wrong(
        change=edit(lambda tensors: tensors.update(loss_mask=torch.ones_like(tensors[_TOKENS]))),
        is_data_set=True,
        says="loss mask",
        file="hs_3.safetensors",
    ),
}
"""By what is wrong. Every entry must be refused; unchanged files must not."""


def try_import(work: Path, base: Base, wrong: Wrong) -> tuple[str, str]:
    """Import files in which something is wrong, in an empty folder.

    Returns:
        The error, empty if the import was accepted; and the path of the changed file.
    """
    samples = make_tokens(NUM_FILES)
    if wrong.is_data_set:
        folder = write_data_set(work / "data", base, samples, layers=wrong.layers)
        path = folder / "hidden_states" / wrong.file
    else:
        folder = write_states(work / "data", base, samples, layers=wrong.layers)
        path = folder / wrong.file
    if wrong.change is not None:
        wrong.change(path)
    options: dict[str, Any] = {"layer_ids": list(wrong.layers), "unit_tokens": 64} | dict(
        wrong.options
    )
    try:
        plan = plan_import(folder, base=base, out=work / "store", imports=ImportSettings(**options))
        run_import(plan)
        Store.open(work / "store")
    except CarryOnError as error:
        return str(error), str(path)
    return "", str(path)


def measure_guards(job: Job) -> None:
    """Report how many kinds of wrong files an import accepted; unchanged ones must be."""
    from carryon.cache.base.model import load_base
    from carryon.cache.settings import ForwardSettings
    from carryon.tools.bench.tiny_base import make_tiny_base

    forward = ForwardSettings(device="cpu", compute_dtype="float32")
    base = load_base(str(make_tiny_base(job.work / "base")), forward=forward)
    right = {"files": Wrong(says=""), "data set": Wrong(says="", is_data_set=True)}
    for number, (name, good) in enumerate(right.items()):
        error, _ = try_import(_folder(job.work / f"right-{number}"), base, good)
        job.report("exchange.right_refused", float(bool(error)), "", at_most=0, files=name)
    accepted = [
        name
        for number, (name, wrong) in enumerate(WRONG.items())
        if wrong.says not in (got := try_import(_folder(job.work / str(number)), base, wrong)[0])
        or not got
    ]
    job.report(
        "exchange.wrong_accepted", len(accepted), f"of {len(WRONG)}", at_most=0, accepted=accepted
    )


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
