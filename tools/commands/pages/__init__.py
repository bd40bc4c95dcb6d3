"""Pages of HTML that commands write: text of data and models, escaped.

No command is here.
"""
