"""Images of a data set: files and URLs, and their embeddings.

Files named by a source are downloaded and decoded here; the vision model is in `vixml_jax.models`.
"""
