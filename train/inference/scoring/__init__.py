"""Accuracy: problems with right answers, rules that judge an answer, arms, and their comparison.

Nothing here trains, and nothing here prints.
"""
