"""Steps that are compiled for a few sizes of batches: what is chosen, and what steps call.

How a batch is padded to a size is in ../../data/padding.py.
"""
