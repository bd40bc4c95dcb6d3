"""`carryon merge`: base and carry-on as one checkpoint, or as a PEFT adapter."""

from typing import Any

from carryon.tools.cli.output import print_result


def merge(
    *,
    carryon: str,
    base: str = "",
    out: str,
    adapter: bool = False,
    device: str = "auto",
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Write base and carry-on as an ordinary checkpoint.

    AutoModelForCausalLM.from_pretrained loads it without this package. The blocks of a `native`
    are appended to the base's, those of a `top` replace the base's last ones. With --adapter a
    `top` trained by LoRA becomes a PEFT adapter for the base. The last line on stdout is a JSON
    line.

    Example:
        carryon merge --carryon run/carryon --base base --out merged

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        base: The base: hub id, folder or .gguf file. Omitted: where it was at extraction.
        out: A new folder.
        adapter: Write a PEFT adapter instead of a checkpoint.
        device: Where the base is loaded: `auto`, `cpu`, `cuda`, ...
        allow_pickle: Read the base's weights from pickle files, which can run code, if it has no
            safetensors.
    """
    from carryon.train.inference.merge import merge as merge_carryon

    report = merge_carryon(
        carryon,
        out=out,
        base=base or None,
        adapter=adapter,
        device=device,
        allow_pickle=allow_pickle,
    )
    kind = "PEFT adapter" if adapter else "checkpoint"
    return print_result(report, f"{out}: {kind} of {report['bytes'] / 1e6:,.1f} MB")
