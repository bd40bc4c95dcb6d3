"""Commands that write a folder for transformers: base and carry-on merged, a base converted.

What a carry-on or a store is, and how either is run, is not here.
"""
