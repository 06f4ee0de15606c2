"""Retrieval-augmented inference: labels of the nearest training queries are mixed into the ranking.

`mixing` has the arithmetic and its tuning, `neighbours` the settings of a run and the search.
"""
