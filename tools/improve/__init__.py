"""`carryon sample` and `carryon improve`: verified answers as a corpus, and rounds of training.

Sampling itself is in `carryon.train.inference.sampling`.
"""
