"""Bits of bfloat16, and the grid of the lossy profiles."""

import numpy as np
import pytest
import torch

from carryon.cache.format.quantization import STEPS, bfloat16_bits, from_codes, to_codes

WIDTH = 48


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def make_states(num_rows: int = 200, seed: int = 0) -> np.ndarray:
    """Rows of channels of very unequal size; the first is far larger than the rest."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((num_rows, WIDTH)) * random.lognormal(0, 1, WIDTH)
    states[0] *= 1000
    return states.astype(np.float32)


def test_bits_of_bfloat16_are_those_of_torch() -> None:
    states = make_states()
    expected = torch.from_numpy(states).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bfloat16_bits(states), expected)


@pytest.mark.parametrize("profile", list(STEPS))
def test_every_state_comes_back_within_half_a_step_of_its_token_and_channel(profile: str) -> None:
    states = make_states()
    codes = to_codes(states, step=STEPS[profile])
    back = widen(from_codes(codes))
    half = 0.5 * codes.token_scale[:, None] * codes.channel_scale
    rounding = np.abs(back) * 2.0**-8  # to bfloat16
    assert (np.abs(back - states) <= half * 1.0001 + rounding).all()
    assert (np.abs(back - states) > half * 0.5).any()


def test_codes_become_the_nearest_bfloat16_of_their_place_on_the_grid() -> None:
    codes = to_codes(make_states(), step=0.04)
    q = codes.codes.astype(np.float64) - 0x8080
    exact = (q * codes.token_scale[:, None] * codes.channel_scale).astype(np.float32)
    found = from_codes(codes)
    np.testing.assert_allclose(widen(found), exact, rtol=2.0**-8)
    assert (found == bfloat16_bits(exact)).mean() > 0.999  # but for ties and the last bit


def test_ordinary_codes_share_one_high_byte() -> None:
    codes = to_codes(make_states()[1:], step=0.08).codes
    assert (codes >> 8 == 0x80).mean() > 0.99


def test_rows_of_zeros_stay_zeros() -> None:
    states = make_states()
    states[5] = 0
    assert not from_codes(to_codes(states, step=0.04))[5].any()


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_states_of_any_size_are_kept(size: float) -> None:
    states = make_states() * np.float32(size)
    back = widen(from_codes(to_codes(states, step=0.04)))
    norms = np.linalg.norm((back - states) / size, axis=1)
    assert (norms <= 0.05 * np.linalg.norm(states / size, axis=1)).all()
