"""Files and directories: atomic writes, checksums, JSON with a schema, object stores.

Paths may be local or in an object store (gs://bucket/run), unless a function says otherwise.
"""
