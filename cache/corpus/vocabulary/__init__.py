"""Vocabularies of tokenizers as bytes.

No text is tokenized here.
"""
