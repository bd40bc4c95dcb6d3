"""The subcommands of `carryon`, one file each: parse, call one function, print the result.

No logic that a library user would miss.
"""
