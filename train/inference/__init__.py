"""Base and carry-on together: composed model, generation, evaluation, accuracy, merging.

Nothing here trains.
"""
