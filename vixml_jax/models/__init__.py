"""Text and vision towers as Flax Linen modules, and loaders for Hugging Face checkpoints.

A tower reads packed items (tokens and image embeddings) and returns one vector per item. Modules
name logical axes only; `vixml_jax.parallel.sharding` maps them to the mesh.
"""
