"""Whether a carry-on gains from a teacher, a larger base of the same tokenizer.

`experiment` is the command; `join` proves that two stores hold the same tokens, `log_probs` keeps
the teacher's distributions, `loss` imitates them and `training` is a plain loop in float32.
"""
