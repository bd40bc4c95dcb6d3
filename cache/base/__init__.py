"""The frozen LLM: loading it, its architecture, its identity, hooks on its hidden states, its head.

Nothing here writes a store.
"""
