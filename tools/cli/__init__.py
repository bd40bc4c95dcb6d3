"""The command line: typed functions to options, help, one-line errors, exit codes.

No command of its own: see `commands`.
"""
