"""The label side of the model: label table, prototype network, centroids and label head.

Table and head hold one row per label, sharded over the mesh.
"""
