"""`carryon merge`: base and carry-on as an ordinary checkpoint, or a PEFT adapter."""

import json
import logging
from typing import Any

logger = logging.getLogger(__name__)


def merge(
    *, carryon: str, base: str, out: str, adapter: bool = False, device: str = "auto"
) -> dict[str, Any]:
    """Write base and carry-on as an ordinary checkpoint, which needs nothing of ours.

    A `native` adds its blocks behind the base's; a `top` takes the place of the base's last ones.
    The folder is what AutoModelForCausalLM.from_pretrained loads, with the base's tokenizer. With
    --adapter a `top` trained by LoRA becomes a PEFT adapter for the base instead.

    Example:
        carryon merge --carryon run/carryon --base base --out merged

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        base: The base: hub id, folder or .gguf file.
        out: A new folder.
        adapter: Write a PEFT adapter instead of a checkpoint.
        device: Where the base is loaded: auto, cpu, cuda, ...
    """
    from carryon.train.inference.merge import merge as merge_carryon

    report = merge_carryon(carryon, base=base, out=out, adapter=adapter, device=device)
    logger.info(
        f"{out}: {'PEFT adapter' if adapter else 'checkpoint'} of {report['bytes'] / 1e6:,.1f} MB"
    )
    print(json.dumps(report))
    return report
