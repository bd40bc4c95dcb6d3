"""States that a GPU copies beside its computation, against a plain copy of all of them."""

import numpy as np
import pytest
import torch

from carryon.cache.device import SideStreams
from carryon.cache.extraction.packing import Batch, make_batch, plan_batches
from carryon.cache.extraction.stages.staging import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("keeps_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_states_are_those_of_a_plain_copy(keeps_bits: bool, dtype: torch.dtype) -> None:
    """While the GPU computes the states of later batches, in memory that is free by then."""
    rows, width, taps = 4096, 512, ["final", "layer.1"]
    lengths = np.random.default_rng(0).integers(1, 200, 40).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    assert lengths.sum() <= rows
    tokens = np.zeros(rows, dtype=np.int32)
    batches = [
        make_batch(samples, lengths=lengths, starts=starts, tokens=tokens)
        for samples in plan_batches(lengths, batch_tokens=1024)
    ]

    def made(batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        """Return the same states for the same seed."""
        torch.manual_seed(seed)
        shape = (*batch.ids.shape, width)
        return {tap: torch.randn(shape, dtype=dtype, device="cuda") for tap in taps}

    streams = SideStreams()
    staging = Staging(taps, num_rows=rows, width=width, keeps_bits=keeps_bits, streams=streams)
    for unit in range(3):
        staging.clear()
        for number, batch in enumerate(batches):
            assert staging.add(batch, made(batch, 100 * unit + number)) is not None
        plain = {tap: torch.zeros(rows, width, dtype=dtype) for tap in taps}
        staged = {tap: each[:] for tap, each in staging.rows(int(lengths.sum())).items()}
        for number, batch in enumerate(batches):
            for tap, states in made(batch, 100 * unit + number).items():
                plain[tap][batch.rows] = states.cpu().reshape(-1, width)[batch.places]
        for tap, given in staged.items():
            stored = plain[tap].bfloat16().view(torch.uint16) if keeps_bits else plain[tap].float()
            assert np.array_equal(given, stored.numpy())
