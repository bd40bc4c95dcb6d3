"""The stages around the forward passes of an extraction: batches read ahead, states copied to the
host, chunks encoded, files written. They overlap, and bounded queues hold back the faster ones.
Running the base is not here.
"""
