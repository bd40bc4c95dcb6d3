"""Benchmarks of hidden states in files of other programs: speed, guards, exact round trips.

What is measured is in `carryon.cache.exchange`.
"""
