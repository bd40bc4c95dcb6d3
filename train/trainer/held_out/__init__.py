"""Held-out loss: the base and carry-ons measured in one pass over samples of a store.

What becomes of it, such as stopping early, is in the trainer.
"""
