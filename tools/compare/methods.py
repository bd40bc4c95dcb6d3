"""What is trained in `carryon compare`, all in one form: losses of samples, and weights to move.

Carry-ons and controls read a store, LoRA and full fine-tuning run the whole base. Batches are flat
(train/packed_attention.py), supervised positions alone go through the head, and the loss is the
trainer's own, for every method: so LoRA is measured at its fastest. Only full fine-tuning, whose
head moves too, takes the plain formula. Letters: N tokens, M supervised positions, D width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carryon.cache.base.model import load_base, read_head
from carryon.cache.corpus.dataset import Sample
from carryon.cache.device import DEFAULT_CHUNK, multiplies_bfloat16, pick_device
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.compare.settings import LORA_RANK, Method
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
)
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
"""What makes a batch of samples, given their indices in the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """A method that can be trained."""

    model: nn.Module
    """Its parameters that require a gradient are trained."""
    losses: Callable[[Batch], Tensor]
    """Cross-entropy of each supervised position, [M] float32, differentiable."""
    ship_bytes: int
    """What a user's version takes up, in bfloat16."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """What is trained."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def trainable_bytes(self) -> int:
        """Bytes of it, as it is trained."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)


def read_samples(samples: Sequence[Sample]) -> Reader:
    """Return a reader of tokens alone, for what runs the base itself."""

    def read(chosen: NDArray[np.int64]) -> Batch:
        some = [samples[index] for index in chosen.tolist()]
        return make_batch(
            chosen,
            np.array([len(sample.tokens) for sample in some]),
            tokens=np.concatenate([sample.tokens for sample in some]),
            loss_mask=np.concatenate([sample.loss_mask for sample in some]),
            states={},
            is_pinned=False,
        )

    return read


def read_store(store: Store, samples: Sequence[Sample], taps: Sequence[str]) -> Reader:
    """Return a reader of tokens and states.

    Args:
        store: of all of the samples or some, which its own ids tell.
        samples: of which are chosen.
        taps: whose states are wanted.
    """
    places = {store.sample_id(place): place for place in range(store.num_samples)}

    def read(chosen: NDArray[np.int64]) -> Batch:
        rows = [store.read_sample(places[samples[index].id], taps=taps) for index in chosen]
        return make_batch(
            chosen,
            np.array([len(row.tokens) for row in rows]),
            tokens=np.concatenate([row.tokens for row in rows]),
            loss_mask=np.concatenate([row.loss_mask for row in rows]),
            states={tap: np.concatenate([row.hidden[tap] for row in rows]) for tap in taps},
            is_pinned=False,
        )

    return read


def read_taps(method: Method) -> list[str]:
    """Return the taps that a carry-on's training reads."""
    assert method.carryon is not None
    return stream_taps(method.carryon)


def build_learner(
    method: Method,
    *,
    base: str,
    store: Store | None,
    seed: int,
    samples: Sequence[Sample] = (),
    sampled_softmax: int = 0,
) -> Learner:
    """Return a method's untrained learner: at first it is the base.

    Args:
        method: which.
        base: the base.
        store: of the carry-on's states; None for what trains the base.
        seed: of the first weights.
        samples: of the training half; a sampled softmax holds their most frequent tokens.
        sampled_softmax: rows that it draws beside; 0: the loss is exact.

    Raises:
        MissingExtraError: PEFT is not installed.
    """

    def sampling(head: FrozenHead) -> FrozenHead:
        counts = np.zeros(head.vocab_size, dtype=np.int64)
        for sample in samples:
            counts += np.bincount(sample.tokens, minlength=head.vocab_size)
        return with_sampled_softmax(head, counts, sampled_softmax)

    if method.carryon is None:
        return _whole_base(base, has_lora=method.name == "lora", seed=seed, sampling=sampling)
    assert store is not None
    device = pick_device("auto")
    if method.name in ("linear", "mlp"):
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
        rows = _rows_of(head, batch)
        return pair_losses(module, batch.to(device), head=rows, chunk=DEFAULT_CHUNK, alpha=1.0)

    return Learner(model=module, losses=losses, ship_bytes=2 * _count(module))


class Control(CarryOn):
    """A correction of each token's state by itself: a linear map, or an MLP without attention."""

    def __init__(self, settings: CarryOnSettings, *, base_width: int, is_linear: bool) -> None:
        """Build with a zero output, as a carry-on begins; an MLP has the size of a bottleneck."""
        nn.Module.__init__(self)
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
        found: Tensor = self.up(x if self.is_linear else nn.functional.silu(x))
        return found


def _whole_base(
    source: str, *, has_lora: bool, seed: int, sampling: Callable[[FrozenHead], FrozenHead]
) -> Learner:
    base = load_base(source, forward=ForwardSettings())
    model: Any = base.model
    device = base.device
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    if has_lora:
        shape = CarryOnSettings(kind="top", lora_rank=LORA_RANK)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            add_lora_(base.architecture.decoder, shape)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # as PEFT has it, whatever the base's type
    else:
        model.float().requires_grad_(True)  # weights that move need more digits than bfloat16
    is_bfloat16 = multiplies_bfloat16(device)
    frozen: FrozenHead | None = None
    if has_lora:
        dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        frozen = sampling(frozen_head(read_head(base), device=device, dtype=dtype))
    decoder, head = base.architecture.decoder, base.architecture.head

    def losses(batch: Batch) -> Tensor:
        batch = batch.to(device)
        ids = batch.tokens.long()[None]
        packing = batch.packing()
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            states_MD = decoder(
                input_ids=ids,
                position_ids=packing.position_ids,
                attention_mask=unused_mask(torch.zeros((), device=device)),
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0][batch.positions]
            if frozen is None:
                logits = head(states_MD).float() * base.architecture.logit_scale
        if frozen is None and base.architecture.softcap is not None:
            logits = base.architecture.softcap * torch.tanh(logits / base.architecture.softcap)
        if frozen is None:
            return nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        rows = _rows_of(frozen, batch)
        return token_losses(states_MD.float(), batch.targets, head=rows, chunk=DEFAULT_CHUNK)

    return Learner(model=model, losses=losses, ship_bytes=2 * _count(model))


def _rows_of(head: FrozenHead, batch: Batch) -> FrozenHead:
    """Return the rows to multiply: a step's, or all where something is evaluated."""
    return sampled_head(head, batch.targets) if torch.is_grad_enabled() else head


def _count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def same_size(one: CarryOnSettings, *, taps: list[str], base_width: int) -> CarryOnSettings:
    """Return a shape on `taps` with no more weights than `one`, the MLPs as much smaller."""
    more = (len(taps) - len(one.taps)) * (one.width * base_width + base_width)
    mixer = len(taps) * (len(taps) * one.width + 1)
    intermediate_size = one.intermediate_size - math.ceil(
        (more + mixer) / (3 * one.width * one.blocks)
    )
    return CarryOnSettings.from_dict(
        one.to_dict() | {"taps": taps, "intermediate_size": max(1, intermediate_size)}
    )
