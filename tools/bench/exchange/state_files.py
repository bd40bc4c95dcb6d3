"""Files of hidden states, as vLLM's connector and speculators write them, without either."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.exchange.layers import tap_of

LAYERS = (0, 1, 2)
"""Layer ids of the files of a tiny base, of two blocks: embedding, block 1, prenorm."""


def make_tokens(num_files: int, *, seed: int = 0, vocab_size: int = 256) -> list[NDArray[np.int64]]:
    """Return random token ids of some samples, [T] each, T from 3 to 40."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 41, num_files)
    return [random.integers(3, vocab_size, length) for length in lengths]


def make_states(base: Base, tokens: NDArray[np.int64], layers: Sequence[int]) -> torch.Tensor:
    """Return the base's states of token ids [T] in bfloat16, [T, L, D]."""
    taps = [tap_of(layer, num_layers=base.identity.num_layers) for layer in layers]
    found = capture(base, taps, torch.from_numpy(tokens)[None])
    return torch.stack([found[tap][0] for tap in taps], dim=1).bfloat16().clone()


def write_states(
    folder: Path,
    base: Base,
    samples: Sequence[NDArray[np.int64]],
    *,
    layers: Sequence[int] = LAYERS,
    name: str = "request-{}",
) -> Path:
    """Write a file of each sample to a folder, which is made, and return it."""
    folder.mkdir(parents=True)
    for number, tokens in enumerate(samples):
        tensors = {
            "hidden_states": make_states(base, tokens, layers),
            "token_ids": torch.from_numpy(tokens),
        }
        save_file(tensors, folder / f"{name.format(number)}.safetensors")
    return folder


def write_data_set(
    folder: Path,
    base: Base,
    samples: Sequence[NDArray[np.int64]],
    *,
    layers: Sequence[int] = LAYERS,
) -> Path:
    """Write a data set of speculators with its files; every third token is no target."""
    import datasets

    rows = {
        "input_ids": [tokens.tolist() for tokens in samples],
        "loss_mask": [(np.arange(len(tokens)) % 3 > 0).astype(int).tolist() for tokens in samples],
        "seq_len": [len(tokens) for tokens in samples],
    }
    table = datasets.Dataset.from_dict(rows)
    table.set_format("torch")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(folder))
    finally:
        if not bars:
            datasets.enable_progress_bars()
    write_states(folder / "hidden_states", base, samples, layers=layers, name="hs_{}")
    return folder
