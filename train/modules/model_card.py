"""The model card of a carry-on: README.md with the metadata that a model hub reads."""

from collections.abc import Mapping
from typing import Any

import yaml

from carryon.cache.format.framing import Framing
from carryon.train.config import CarryOnSettings
from carryon.train.kinds import get_kind

_CARD = """\
---
{metadata}---

# Carry-on for {base}

A carry-on of the kind `{kind}` that reads the taps {taps}: {what}.
The weights of the base model are not included.

## Model details

| | |
| --- | --- |
| base model | {base} |
| base weights (SHA-256) | {weights_sha256} |
| base tokenizer (SHA-256) | {tokenizer_sha256} |
| size | {size} |
| alpha | {alpha:g} |
| prompt format | {framing} |
| trained with | {versions} |

## How to use

{usage}

## Training data

Trained on hidden states of the base, extracted once into a store. Store fingerprint: {store}.

## Evaluation

Mean negative log-likelihood (NLL) in nats per target token, on samples held out from training.

| metric | value |
| --- | --- |
{figures}

{others}## Limitations

It works only with the exact weights and tokenizer of its base model. Text unlike its training data
has not been measured. Licence and biases of the base model and of the training data apply.
"""

_USAGE = """\
```
carryon generate --carryon . --prompt "..."
```

```python
from carryon.train import CarryOnForCausalLM

model = CarryOnForCausalLM.from_pretrained(".")  # or its hub id; base=... if the base has moved
model.generate(**model.tokenizer("...", return_tensors="pt"))
```"""
_MIXTURE_USAGE = """\
It is one part of a mixture of several bases. Generating
text with those that it reads the states of is not built yet.

```
carryon evaluate --store STORE --mix ALIGNED_STORE --carryon .
```"""
_GATE_USAGE = """\
It is one part of a mixture of several bases, whose distributions a gate mixes. It generates
with all of them; `--mix` names their places, in the order below, if they have moved.

```
carryon generate --carryon . --prompt "..."
carryon evaluate --store STORE --mix ALIGNED_STORE --carryon .
```"""
_WAYS = {
    "probability": "The gate in `gate.safetensors` mixes their distributions with the carry-on's",
    "state": "The carry-on reads their states",
    "both": "The carry-on reads their states, and the gate in `gate.safetensors` mixes their "
    "distributions with its own",
}
_OTHERS = """\
## Other bases

{way}, in this order:

| base | weights (SHA-256) | tokenizer | vocabulary map | store | taps |
| --- | --- | --- | --- | --- | --- |
{rows}

"""


def model_card(card: Mapping[str, Any], *, num_bytes: int) -> str:
    """Return the text of README.md.

    Args:
        card: fields of a CarryOnCard, without local paths.
        num_bytes: size of the weights.
    """
    shape, base = CarryOnSettings.from_dict(card["settings"]), card["base"]
    what = {
        "": f"{shape.blocks} decoder blocks of width {shape.width} that correct the last hidden "
        "state of a frozen base model",
        "append": f"{shape.blocks} new decoder blocks behind the last of a frozen base model",
        "replace": f"a trained version of the last {shape.blocks} decoder blocks of its base model",
    }
    name = str(base.get("id"))
    metadata = {
        "library_name": "carryon",
        "pipeline_tag": "text-generation",
        "tags": ["carry-on", shape.kind],
    }
    if base.get("revision") is not None:  # a base on the hub
        metadata |= {"base_model": name, "base_model_relation": "adapter"}
    figures, mixture = card["figures"].items(), card.get("mixture")
    return _CARD.format(
        metadata=yaml.safe_dump(metadata),
        base=name,
        kind=shape.kind,
        taps=", ".join(shape.taps),
        what=what[get_kind(shape.kind).merges],
        weights_sha256=str(base.get("weights_sha256"))[:12],
        tokenizer_sha256=str(base.get("tokenizer_sha256"))[:12],
        size=f"{num_bytes / 1e6:.2f} MB",
        alpha=card["alpha"],
        framing=_prompt_format(Framing.from_dict(card["framing"])),
        versions=", ".join(f"{key} {value}" for key, value in card["versions"].items()),
        store=card["store_fingerprint"][:12],
        usage=_usage(mixture),
        others=_other_bases(mixture) if mixture else "",
        figures="\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures),
    )


def _usage(mixture: Mapping[str, Any] | None) -> str:
    if not mixture:
        return _USAGE
    return _GATE_USAGE if mixture["by"] == "probability" else _MIXTURE_USAGE


def _other_bases(mixture: Mapping[str, Any]) -> str:
    """Return the table of the bases that are mixed in."""
    digests = ("weights_sha256", "tokenizer_sha256", "vocabulary_map_sha256", "store_fingerprint")
    rows = [
        f"| {each['base']} | {' | '.join(each[name][:12] for name in digests)} | "
        f"{', '.join(each.get('taps', ['-']))} |"
        for each in mixture["sources"]
    ]
    return _OTHERS.format(way=_WAYS[mixture["by"]], rows="\n".join(rows))


def _prompt_format(framing: Framing) -> str:
    """Return how prompts should stand before the model, as training texts did."""
    if framing.is_chat is None:
        return "not recorded"
    if not framing.is_chat:
        return "plain text, without a chat template"
    if framing.chat_template:
        return "a chat template of its own, in carryon.json"
    return "the chat template of the base"
