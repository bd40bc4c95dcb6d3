"""The methods of `carryon compare` in one form: losses of samples, and weights to train.

Carry-ons and controls read a store, LoRA and full fine-tuning run the base. All use packed batches,
multiply the head at supervised positions only, and share the trainer's loss, so LoRA is measured at
its fastest. Full fine-tuning trains the head too and takes the plain formula.
Letters: N tokens, M supervised positions, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carryon.cache.base.model import Base, read_head
from carryon.cache.corpus.samples import Sample
from carryon.cache.device import DEFAULT_CHUNK, multiplies_bfloat16, pick_device
from carryon.cache.store.reader import Store
from carryon.tools.compare.settings import CONTROLS, LORA_RANK, Method
from carryon.train.config import CarryOnSettings, LossSettings
from carryon.train.data.batch import Batch, make_batch
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead, frozen_head, place_head
from carryon.train.losses.sampled_softmax import sampled_head, with_sampled_softmax
from carryon.train.modules.base_blocks import add_lora_
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.modules.decoder import NORM_EPS
from carryon.train.modules.linear import Product
from carryon.train.modules.packed_attention import (
    PACKED_ATTENTION,
    Packing,
    register_packed_attention,
    unused_mask,
)
from carryon.train.modules.taps import stream_taps
from carryon.train.trainer.step import pair_losses

Reader = Callable[[NDArray[np.int64]], Batch]
"""Makes a batch of samples, given their indices in the data."""
Sampling = Callable[[FrozenHead], FrozenHead]
"""Adds a sampled softmax to a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A method ready for training."""

    model: nn.Module
    """Its parameters with a gradient are trained."""
    losses: Callable[[Batch], Tensor]
    """Cross-entropy of each supervised position, [M] float32, differentiable."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def ship_bytes(self) -> int:
        """Size of the trained parameters in bfloat16."""
        return 2 * sum(weight.numel() for weight in self.weights)


def read_samples(samples: Sequence[Sample], states: Callable[[int], Any] | None = None) -> Reader:
    """Return a reader of tokens, and of states if `states` returns those of a sample by tap."""

    def read(chosen: NDArray[np.int64]) -> Batch:
        some = [samples[index] for index in chosen.tolist()]
        hidden = [states(index) for index in chosen.tolist()] if states else [{}]
        return make_batch(
            chosen,
            np.array([len(sample.tokens) for sample in some]),
            tokens=np.concatenate([sample.tokens for sample in some]),
            loss_mask=np.concatenate([sample.loss_mask for sample in some]),
            states={tap: np.concatenate([each[tap] for each in hidden]) for tap in hidden[0]},
            is_pinned=False,
        )

    return read


def read_store(store: Store, samples: Sequence[Sample], taps: Sequence[str]) -> Reader:
    """Return a reader of tokens and states; the store finds the samples by their ids."""
    places = {store.sample_id(place): place for place in range(store.num_samples)}

    def states(index: int) -> Mapping[str, NDArray[Any]]:
        return store.read_sample(places[samples[index].id], taps=taps).hidden

    return read_samples(samples, states)


def read_taps(method: Method) -> list[str]:
    """Return the taps that training a carry-on reads."""
    assert method.carryon is not None
    return stream_taps(method.carryon)


def build_learner(
    method: Method,
    *,
    load_base: Callable[[], Base],
    store: Store | None,
    seed: int,
    samples: Sequence[Sample],
    sampled_softmax: int,
) -> Learner:
    """Return an untrained learner, which equals the base.

    Args:
        method: method to train.
        load_base: loads the base.
        store: states of the carry-on's taps; None for what trains the base.
        seed: of the first weights.
        samples: of the training half; a sampled softmax keeps their most frequent tokens.
        sampled_softmax: negatives per step; 0: the exact loss.
    """

    def sampling(head: FrozenHead) -> FrozenHead:
        counts = np.zeros(head.vocab_size, dtype=np.int64)
        for sample in samples:
            counts += np.bincount(sample.tokens, minlength=head.vocab_size)
        return with_sampled_softmax(head, counts, sampled_softmax)

    if method.carryon is None:
        return _whole_base(
            load_base(), has_lora=method.name == "lora", seed=seed, sampling=sampling
        )
    assert store is not None
    device = pick_device("auto")
    if method.name in CONTROLS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: CarryOn = Control(
                method.carryon, base_width=store.width, is_linear=method.name == "linear"
            )
    else:
        module = build_carryon(method.carryon, store, seed=seed)
    module = module.to(device)
    head = sampling(place_head(store, LossSettings(), device=device))

    def losses(batch: Batch) -> Tensor:
        rows = _step_head(head, batch)
        return pair_losses(module, batch.to(device), head=rows, chunk=DEFAULT_CHUNK, alpha=1.0)

    return Learner(model=module, losses=losses)


class Control(CarryOn):
    """A correction of each token by itself: a linear map, or an MLP as large as a bottleneck."""

    def __init__(self, settings: CarryOnSettings, *, base_width: int, is_linear: bool) -> None:
        """Build with a zero output."""
        super().__init__()
        self.settings = settings
        width = base_width * len(settings.taps)
        inner = round(4.5 * settings.width * base_width / (width + base_width))
        self.enter = nn.Identity() if is_linear else nn.Linear(width, inner)
        self.up = Product(width if is_linear else inner, base_width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.is_linear = is_linear

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return delta at chosen tokens, [M, D]; see CarryOn."""
        taps = [states[tap][positions_M].float() for tap in self.settings.taps]
        x = torch.cat([nn.functional.rms_norm(x, x.shape[-1:], eps=NORM_EPS) for x in taps], dim=-1)
        x = self.enter(x)
        delta: Tensor = self.up(x if self.is_linear else nn.functional.silu(x))
        return delta


def _whole_base(base: Base, *, has_lora: bool, seed: int, sampling: Sampling) -> Learner:
    model: Any = base.model
    device = base.device
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    is_bfloat16 = multiplies_bfloat16(device)
    frozen: FrozenHead | None = None
    if has_lora:
        shape = CarryOnSettings(kind="top", lora_rank=LORA_RANK)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora_(base.architecture.decoder, shape)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # as in PEFT, whatever the base's type
        dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        frozen = sampling(frozen_head(read_head(base), device=device, dtype=dtype))
    else:
        model.float().requires_grad_(True)  # small updates vanish in bfloat16
    decoder, head = base.architecture.decoder, base.architecture.head

    def losses(batch: Batch) -> Tensor:
        batch = batch.to(device)
        packing = batch.packing()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            states_MD = decoder(
                input_ids=batch.tokens.long()[None],
                position_ids=packing.position_ids,
                attention_mask=unused_mask(torch.zeros((), device=device)),
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0][batch.positions]
            if frozen is None:
                logits = head(states_MD).float() * base.architecture.logit_scale
        if frozen is not None:
            rows = _step_head(frozen, batch)
            return token_losses(states_MD.float(), batch.targets, head=rows, chunk=DEFAULT_CHUNK)
        if base.architecture.softcap is not None:
            logits = base.architecture.softcap * torch.tanh(logits / base.architecture.softcap)
        return nn.functional.cross_entropy(logits, batch.targets, reduction="none")

    return Learner(model=model, losses=losses)


def _step_head(head: FrozenHead, batch: Batch) -> FrozenHead:
    """Return the rows of a training step; an evaluation takes all."""
    return sampled_head(head, batch.targets) if torch.is_grad_enabled() else head


def same_size(one: CarryOnSettings, *, taps: list[str], base_width: int) -> CarryOnSettings:
    """Return a shape on `taps` with no more weights than `one`, by smaller MLPs."""
    more = (len(taps) - len(one.taps)) * (one.width * base_width + base_width)
    mixer = len(taps) * (len(taps) * one.width + 1)
    intermediate_size = one.intermediate_size - math.ceil(
        (more + mixer) / (3 * one.width * one.blocks)
    )
    return CarryOnSettings.from_dict(
        one.to_dict() | {"taps": taps, "intermediate_size": max(1, intermediate_size)}
    )
