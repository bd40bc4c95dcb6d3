"""Extraction by actors of Ray: each is one more process that claims units of a shared store. Unit
numbers go to them and figures come back; states never pass through Ray. Claims are not here.
"""
