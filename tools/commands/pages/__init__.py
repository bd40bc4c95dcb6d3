"""Text of data and models for people, escaped: on a terminal, and as pages of HTML.

No command is here.
"""
