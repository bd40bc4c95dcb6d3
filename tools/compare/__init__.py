"""`carryon compare`: carry-ons, LoRA and full fine-tuning on the same text in the same time.

Also the figures and corpora that benchmarks share.
"""
