"""Conversations: rendered by a chat template, checked for what it drops, with their targets.

Nothing here knows tokens; what a record of messages may look like is `formats`'s.
"""
