"""Make and read stores of a frozen base's hidden states.

Rooms, from the ground up: base and corpus, format, store, extraction. Nothing here trains.
"""
