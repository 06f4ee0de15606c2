"""Meshes, shardings and processes: how a run is laid out over devices and hosts.

Knows nothing of models or data.
"""
