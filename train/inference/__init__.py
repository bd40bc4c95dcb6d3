"""Base and carry-on together: composed model, generation, evaluation, scoring, merging.

Nothing here trains.
"""
