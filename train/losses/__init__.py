"""Loss of a carry-on through the frozen head: exact or sampled, in chunks, with its gradient.

No optimizer and no data order.
"""
