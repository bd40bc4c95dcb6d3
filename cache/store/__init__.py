"""Open, read, write and verify the units of a store.

What makes hidden states is `extraction`; what bytes look like is `format`.
"""
