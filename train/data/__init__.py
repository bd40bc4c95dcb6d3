"""From a store to batches: splits, mixtures, contamination, sampling order, streaming.

Nothing here knows losses or weights.
"""
