"""`carryon compare`: carry-ons, LoRA and full fine-tuning on the same text in the same time.

Also the figure that benchmarks print, and peak memory.
"""
