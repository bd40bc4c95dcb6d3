"""Versions of a carry-on: lineages, releases, new text, a new base.

A single run is `trainer`.
"""
