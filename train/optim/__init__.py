"""Optimizers, learning-rate schedules and learning-rate paths.

No training loop: see `trainer`.
"""
