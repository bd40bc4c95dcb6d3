"""The `carryon` command and what only a person at a terminal needs.

No capability of its own: every command calls `carryon.cache` or `carryon.train`.
"""
