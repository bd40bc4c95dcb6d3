"""Logits that must be equal up to rounding: of mixed rows, and from a cache in every family."""

import torch
from torch import Tensor

from carryon.cache.base.model import load_base
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.families import FAMILIES, make_family_base, randomize_
from carryon.tools.bench.job import Job
from carryon.tools.bench.random_carryons import MAX_BYTES, make_carryons, make_prompts
from carryon.train.inference.modeling import CarryOnForCausalLM

FAMILY_TARGET = 64 * torch.finfo(torch.float32).eps
"""Relative error of float32 logits that rounding alone may cause in two or three blocks."""
_FAMILY_TOKENS = 20  # longer than any sliding window among them
_FIRST_TOKENS = 7  # in one step into the cache, then one by one


@torch.no_grad()
def measure_rows(
    job: Job, *, rows: int = 16, prompt_tokens: int = 64, carryon_bytes: int = MAX_BYTES
) -> None:
    """Compare each row of a mixed batch with the same batch in which all rows have its carry-on.

    The base's part is then equal to the bit, and only the products with a row's own weights
    differ. The last row has no carry-on and must equal the base bit for bit.
    """
    base = job.load_base()
    tokens = make_prompts(base, job.work, num=rows, num_tokens=prompt_tokens)
    made = make_carryons(base, rows - 1, max_bytes=carryon_bytes, tokens=tokens[:1])
    tokens = tokens.to(base.device)
    model = CarryOnForCausalLM.from_base(base)
    for number, (carryon, card) in enumerate(made):
        model.carryons.put(str(number), carryon.state_dict(), card)
    names = [*model.carryons.names, None]
    mixed = model(tokens, carryons=names).logits
    errors = [
        relative_error(mixed[row], model(tokens, carryons=[name] * rows).logits[row])
        for row, name in enumerate(names)
    ]
    job.report(
        f"rows-{rows}.logits",
        max(errors),
        "relative error",
        at_most=torch.finfo(torch.bfloat16).eps,
        row_without_carryon=errors[-1],
        moved_by_the_carryons=relative_error(mixed[0], model(tokens).logits[0]),
        dtype=str(base.compute_dtype),
    )


@torch.no_grad()
def measure_families(job: Job) -> None:
    """Compare cached with uncached logits on a tiny base of each architecture, in float32."""
    own_base = job.load_base()
    forward = ForwardSettings(device=str(own_base.device), compute_dtype="float32")
    num_ids = len(own_base.tokenizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, num_ids, (2, _FAMILY_TOKENS), generator=generator)
    errors = {}
    for family in FAMILIES:
        folder = make_family_base(
            job.work / family,
            family,
            tokenizer=own_base.tokenizer,
            vocab_size=num_ids,
            special_ids={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            dtype=torch.float32,
            seed=0,
        )
        base = load_base(str(folder), forward=forward)
        carryon, card = make_carryons(base, 1, max_bytes=8192, tokens=tokens)[0]
        randomize_(carryon, seed=1)
        model = CarryOnForCausalLM(base, carryon, card)
        errors[family] = _cache_error(model, tokens.to(base.device))
    job.report(
        "families.cached",
        max(errors.values()),
        "relative error",
        at_most=FAMILY_TARGET,
        families=errors,
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`."""
    wide = expected.float()
    return float((got.float() - wide).norm() / wide.norm())


def _cache_error(model: CarryOnForCausalLM, tokens: Tensor) -> float:
    expected = model(tokens, use_cache=False).logits
    output = model(tokens[:, :_FIRST_TOKENS], use_cache=True)
    logits = [output.logits]
    for token in torch.split(tokens[:, _FIRST_TOKENS:], 1, dim=1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return relative_error(torch.cat(logits, dim=1), expected)
