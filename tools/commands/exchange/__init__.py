"""The commands that exchange hidden states with other programs: import and export.

What the files hold and how they are checked is in `carryon.cache.exchange`.
"""
