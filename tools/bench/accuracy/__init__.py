"""What a carry-on does to answers, counted answer by answer.

`copying` is a small synthetic task about one thing that answers need. `experiment` teaches tasks of
reasoning-gym by recipes and counts right answers beside prompts and LoRA: its steps are planned as
data, run as commands, and counted. Not here: how answers are judged (train/inference/scoring).
"""
