"""Alignment of two tokenizations of one text that knows nothing of the future.

Pure functions and caches of tokenizers. No model is run and no store is read or written here.
"""
