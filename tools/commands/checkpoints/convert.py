"""`carryon convert`: a base in a .gguf file as a folder that loads in seconds."""

from typing import Any

from carryon.tools.cli.output import print_result


def convert(base: str, /, *, out: str) -> dict[str, Any]:
    """Write a base in a .gguf file as an ordinary transformers folder, once.

    Every command that loads a .gguf file unpacks its weights and tokenizer again, which takes a
    minute for 0.5 billion weights. Give --base FOLDER to later commands instead: it loads in
    seconds. Weights, config, tokenizer and chat template have the digests of the .gguf file, so
    stores and carry-ons of one are those of the other. The weights are bfloat16, about four times
    the bytes of a 4-bit file.

    The folder is read back and compared before it gets its name. After a kill nothing has that
    name; run the command again. The last line on stdout is a JSON line.

    Example:
        carryon convert base.gguf --out base

    Args:
        base: The .gguf file; needs the extra gguf.
        out: A new folder.
    """
    from carryon.cache.base.conversion import convert_base

    report = convert_base(base, out=out)
    return print_result(
        report,
        f"{out}: {report['parameters'] / 1e6:,.1f} M weights, {report['bytes'] / 1e6:,.1f} MB, in "
        f"{report['elapsed_s']:,.0f} s. Now: --base {out}",
    )
