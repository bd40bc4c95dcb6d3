"""The commands that exchange hidden states of a store: import, export, recode.

What the files hold and how they are checked is in `carryon.cache.exchange`.
"""
