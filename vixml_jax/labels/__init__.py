"""The label side of the model: label table, prototype network and centroids.

The table holds one row per label, sharded over the mesh.
"""
