"""Files of this project: atomic writes, reading without following links, sealed JSON documents.

What the files mean is for the rooms above: formats of stores, carry-ons, runs and lineages.
"""
