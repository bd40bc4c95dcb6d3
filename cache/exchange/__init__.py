"""Hidden states in other forms: import from files, export to files, recode to another profile.

Files of vLLM's hidden states connector and the layout of `speculators`. What is read here is
checked as if a stranger had made it; nothing here runs an engine.
"""
