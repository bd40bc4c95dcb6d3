"""What a mixture of bases is worth, beside each base alone and each with its own carry-on.

`experiment` is the command; its steps are planned as data (`plan`), run as commands and measured
per byte of text, so that tokenizers compare.
"""
