"""Numbers of bytes as people type them."""

import re

from carryon.cache.errors import InputError


def parse_bytes(option: str, text: str) -> int:
    """Return the bytes of `500MB`, `20 GB`, `1.5T`, `700MiB` or a plain number.

    Raises:
        InputError: it is not a size; the text begins with `option`.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if size is None:
        raise InputError(f"{option}: expected a size such as 500MB or 20GB, got {text!r}")
    power = " KMGT".index(size[2].upper() or " ")
    return int(float(size[1]) * (1024 if size[3] else 1000) ** power)
