"""Distributions of several bases over one vocabulary, and the gate that mixes them.

Pure functions of states, heads and bytes of tokens: no text is aligned and no base is run here.
"""
