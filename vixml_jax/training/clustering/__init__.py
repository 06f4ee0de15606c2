"""Balanced clusters of embeddings by recursive spherical 2-means.

Used to form batches of hard negatives and to assign free vectors to labels.
"""
