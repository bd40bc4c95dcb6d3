"""Where a base is and what can be said of it before transformers loads it.

Hub, folder or .gguf file; its own Python code; whether the hub answers.
"""
