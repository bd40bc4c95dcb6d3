"""Import of optional packages, with an error that names the extra to install."""

import importlib
from types import ModuleType

from carryon.cache.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, which belongs to the optional extra `extra`.

    Raises:
        MissingExtraError: it is not installed; the text names the extra and the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{purpose} needs the package {package!r}, which is not installed: "
            f'run pip install "gpt-carry-on[{extra}]"'
        ) from error
