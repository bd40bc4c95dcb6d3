"""Training runs: steps, checkpoints, metrics, sweeps, distributed processes, results.

The base is never loaded here.
"""
