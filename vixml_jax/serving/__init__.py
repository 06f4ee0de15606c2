"""Predictions from a trained run: its saved label vectors, queries, label updates and exports.

`predictor.Predictor` opens a run directory and returns the best labels of texts and images.
"""
