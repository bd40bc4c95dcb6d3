"""Benchmarks of what a carry-on does to answers, counted answer by answer.

Here: small synthetic tasks on a real base, each about one thing that answers need. Not here: scores
on tasks that people care about, which the experiments measure.
"""
