"""Several processes that extract into one store, on one machine or on many: leases on units,
commits that the first writer wins, processes started here. Computing a unit is not here.
"""
