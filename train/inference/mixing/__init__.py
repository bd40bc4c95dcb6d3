"""Composition: the anchor of a mixture and its other bases generate together.

Each base is a module with a cache of its own here; how they are mixed is in carryon.train.mixing.
"""
