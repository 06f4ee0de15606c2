"""How labels are scored: prototypes, label head and labels of the nearest training queries.

`settings` says how a run scores, `scored_search` searches, `mixing` mixes the labels of training
neighbours into a ranking (retrieval-augmented inference), `tuning` tunes all weights.
"""
