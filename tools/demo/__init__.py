"""`carryon demo`: a real base and real data from packages, then every step of the flow.

Nothing else depends on its corpus.
"""
