"""The check of states against the base, on samples of few tokens."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from carryon.cache.base.model import Base
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.exchange.state_files import LAYERS, write_states


def test_samples_of_two_tokens_with_the_roundings_of_another_program_are_taken(
    tiny_base: Base, store_tmp: Path
) -> None:
    random = np.random.default_rng(0)
    samples = [random.integers(3, 256, 2) for _ in range(12)]
    files = write_states(store_tmp / "files", tiny_base, samples)
    noise = torch.Generator().manual_seed(0)
    states = torch.cat([load_file(path)["hidden_states"] for path in sorted(files.iterdir())])
    channel = states.float().pow(2).mean(0).sqrt()
    for path in files.iterdir():
        tensors = load_file(path)
        shape = tensors["hidden_states"].shape
        off = 0.03 * channel * torch.randn(shape, generator=noise)
        save_file(tensors | {"hidden_states": tensors["hidden_states"] + off.bfloat16()}, path)
    settings = ImportSettings(layer_ids=list(LAYERS), unit_tokens=64)
    plan = plan_import(files, base=tiny_base, out=store_tmp / "store", imports=settings)
    assert run_import(plan).is_finished
    assert Store.open(store_tmp / "store").num_samples == 12
