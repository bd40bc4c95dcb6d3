"""What is measured on this machine before a base is loaded: the dtype to compute in.

Measured on blocks of the base's own class and sizes, with made-up weights; no weight is read.
"""
