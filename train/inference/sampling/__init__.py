"""Corpora from a model's own answers: sampled, verified by a rule, and written as conversations.

Problems, rules and models are those of `scoring`; extraction reads the result as any other corpus.
"""
