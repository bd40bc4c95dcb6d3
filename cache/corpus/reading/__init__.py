"""How files, folders, hub data and rows in memory are found, told apart and opened.

What each row means is read in `carryon.cache.corpus`, whose `sources` and `files` use this.
"""
