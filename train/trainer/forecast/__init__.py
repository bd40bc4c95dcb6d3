"""What a run will take before it begins: memory by arithmetic, seconds by some of its steps.

What a run says of its time once it has begun is in ../engine.py.
"""
