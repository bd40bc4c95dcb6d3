"""Hidden states in files of other programs: import into a store, export from one.

Files of vLLM's hidden states connector and the layout of `speculators`. What is read here is
checked as if a stranger had made it; nothing here runs an engine.
"""
