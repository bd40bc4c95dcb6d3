"""Train carry-ons from a store, without the base, and run them on top of it.

Rooms, from the ground up: modules, data and optim, losses, trainer, inference and continual.
"""
