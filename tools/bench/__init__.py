"""Benchmarks and experiments, run from a checkout: `python -m carryon.tools.bench NAME`.

Not installed; nothing imports this folder.
"""
