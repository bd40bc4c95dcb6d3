"""Text files to samples: reading records, chat templates, tokens and loss masks.

Nothing here knows a model's weights or how samples are packed into units.
"""
