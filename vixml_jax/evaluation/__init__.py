"""Quality of predictions: ranking metrics, slices, intervals, comparisons and the kNN baseline.

Everything here is numpy and scipy on label ids and relevance matrices; nothing imports jax.
"""
