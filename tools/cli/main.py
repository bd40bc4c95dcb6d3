"""Entry point of the `carryon` command."""

import sys
from collections.abc import Sequence

from carryon.tools.cli.subcommands import CARRYON


def main(argv: Sequence[str] | None = None) -> int:
    """Run `carryon` with `argv` (default: the command line) and return its exit code."""
    return CARRYON.main(argv)


if __name__ == "__main__":
    sys.exit(main())
