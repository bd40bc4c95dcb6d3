"""The model card of a carry-on: what it is, its base, its figures and how to use it.

Text for people, with a few lines at the top that a hub understands.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from carryon.train.config import CarryOnSettings

_USE = """\
Base and carry-on answer a prompt, here or on another machine:

```
carryon generate --carryon . --prompt "..."
```

```python
from carryon.train.inference.modeling import CarryOnForCausalLM

model = CarryOnForCausalLM.from_pretrained(".")  # or its id on the hub; base=... where it moved
model.generate(**model.tokenizer("...", return_tensors="pt"), alpha={alpha:g})
```
"""


def model_card(card: Mapping[str, Any], *, num_bytes: int) -> str:
    """Return the text of README.md.

    Args:
        card: fields of a CarryOnCard, without paths of this machine.
        num_bytes: size of the weights.
    """
    shape = CarryOnSettings.from_dict(card["settings"])
    base = card["base"]
    name, is_on_hub = str(base.get("id")), base.get("revision") is not None
    facts: dict[str, Any] = {"library_name": "carryon", "pipeline_tag": "text-generation"}
    facts |= {"base_model": name} if is_on_hub else {}
    rows: dict[str, Any] = {
        "base": f"{name} (weights {str(base.get('weights_sha256'))[:12]}, tokenizer "
        f"{str(base.get('tokenizer_sha256'))[:12]})",
        "store": card["store_fingerprint"][:12],
        "alpha": f"{card['alpha']:g}",
    }
    rows |= {key.replace("_", " "): value for key, value in card["figures"].items()}
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(facts)}---\n",
            f"# Carry-on for {name}\n",
            f"A {shape.kind} of {shape.blocks} blocks, width {shape.width}, on the taps "
            f"{', '.join(shape.taps)}; {num_bytes / 1e6:.2f} MB. It corrects the last hidden state "
            "of its frozen base, whose weights are not in here.\n",
            _USE.format(alpha=card["alpha"]),
            "| | |\n| --- | --- |",
            *(f"| {key} | {value} |" for key, value in rows.items()),
            "",
        ]
    )
