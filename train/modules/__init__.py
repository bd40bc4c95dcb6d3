"""The carry-on: its kinds, their building blocks, saving and loading, its model card.

Nothing here trains or opens a base.
"""
