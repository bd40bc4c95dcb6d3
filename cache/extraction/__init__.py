"""Extract a corpus into a store: pack, run the base, commit units, resume, repair.

The top floor of `cache`: nothing else in it imports this.
"""
