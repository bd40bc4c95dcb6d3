"""The formats that people have: conversations, tool calls, pairs, prompts and texts, checked.

What is read from a file is `reading`'s; what becomes of a record is `conversion`'s.
"""
