"""The pilot: the base over the beginnings of a few samples, before it runs over all of them.

It gives the probe and, for a lossy profile, the error that the manifest records.
Letters: P positions, D width, V vocabulary, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.lm_head import Head, widen
from carryon.cache.base.model import Base
from carryon.cache.corpus.samples import Sample
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.format.probe import NUM_LOGITS, Probe, channel_relative_error
from carryon.cache.format.quantization import STEPS, from_codes, to_codes

PILOT_TOKENS = 256
"""Tokens taken from the start of each pilot sample."""
_PILOT_SAMPLES = 2
_PROBE_POSITIONS = 4  # of each sample
_VOCAB_BLOCK = 8192  # rows of the head that are widened at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class PilotSample:
    """The first tokens of one sample, with the base's states and logits."""

    first_row: int
    """Row of its first token on the token axis."""
    states: dict[str, NDArray[np.float32]]
    """[T, D] float32 for each tap, and always `final`."""
    logits: torch.Tensor
    """[T, V] the base's own."""


def run_pilot(
    base: Base, taps: Sequence[str], samples: Sequence[Sample], units: UnitPlan
) -> list[PilotSample]:
    """Run the base over the beginnings of the first samples of the first unit."""
    pilot = []
    for position in range(min(_PILOT_SAMPLES, int((units.unit == 0).sum()))):
        ids = samples[int(units.order[position])].tokens[:PILOT_TOKENS]
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        states = capture(base, list(dict.fromkeys([*taps, "final"])), batch)
        pilot.append(
            PilotSample(
                first_row=int(units.start[position]),
                states={tap: values[0].float().cpu().numpy() for tap, values in states.items()},
                logits=base_logits(base, batch)[0].float().cpu(),
            )
        )
    return pilot


def make_probe(pilot: Sequence[PilotSample]) -> Probe:
    """Keep a few positions of each pilot sample; the first token, often odd, only if alone."""
    rows, states, ids, logits = [], [], [], []
    for sample in pilot:
        num_tokens = len(sample.logits)
        first = min(1, num_tokens - 1)
        chosen = np.unique(np.linspace(first, num_tokens - 1, _PROBE_POSITIONS).astype(np.int64))
        top = sample.logits[chosen].topk(min(NUM_LOGITS, sample.logits.shape[1]))
        rows.append(sample.first_row + chosen)
        states.append({tap: values[chosen] for tap, values in sample.states.items()})
        ids.append(top.indices.numpy().astype(np.int32))
        logits.append(top.values.numpy().astype(np.float32))
    return Probe(
        rows=np.concatenate(rows),
        states={tap: np.concatenate([each[tap] for each in states]) for tap in states[0]},
        top_ids=np.concatenate(ids),
        top_logits=np.concatenate(logits),
    )


def measure_profile(
    pilot: Sequence[PilotSample], head: Head, *, taps: Sequence[str], profile: str
) -> dict[str, dict[str, float]]:
    """Return the error of a lossy profile on the pilot's states; see `profile_errors`."""
    states = {tap: np.concatenate([sample.states[tap] for sample in pilot]) for tap in taps}
    return profile_errors(states, head, profile=profile)


def profile_errors(
    states_by_tap: Mapping[str, NDArray[np.float32]], head: Head, *, profile: str
) -> dict[str, dict[str, float]]:
    """Return the error of a lossy profile on states [P, D], by tap; empty for an exact one.

    Returns:
        For each tap: `relative_error` (median over tokens of |x' - x| / |x|) and
        `channel_relative_error`; for `final` and `prenorm`, through the head, also `kl` (mean
        nats, base to stored) and `top1` (ratio of tokens with the same most likely next token).
    """
    if profile not in STEPS:
        return {}
    errors = {}
    for tap, states in states_by_tap.items():
        stored = widen(from_codes(to_codes(states, step=STEPS[profile])))
        norms = np.linalg.norm(states, axis=1)
        relative = np.linalg.norm(stored - states, axis=1) / np.maximum(norms, 1e-30)
        errors[tap] = {
            "relative_error": float(np.median(relative)),
            "channel_relative_error": channel_relative_error(stored, states),
        }
        if tap in ("final", "prenorm"):
            pair = (states, stored) if tap == "final" else map(head.norm.apply, (states, stored))
            expected, got = (_log_probs(head, values) for values in pair)
            kl = (expected.exp() * (expected - got)).sum(dim=1).mean()
            top1 = (expected.argmax(dim=1) == got.argmax(dim=1)).float().mean()
            errors[tap] |= {"kl": float(kl), "top1": float(top1)}
    return errors


def _log_probs(head: Head, states: NDArray[np.float32]) -> torch.Tensor:
    """Return [P, V] float32 log-probabilities of `final` states [P, D]."""
    x = torch.from_numpy(np.ascontiguousarray(states))
    logits = torch.empty(len(x), head.vocab_size)
    for first in range(0, head.vocab_size, _VOCAB_BLOCK):
        block = torch.from_numpy(widen(head.weight[first : first + _VOCAB_BLOCK]))
        logits[:, first : first + _VOCAB_BLOCK] = x @ block.T
    if head.bias is not None:
        logits += torch.from_numpy(head.bias)
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, dim=1)
