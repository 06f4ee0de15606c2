"""Maximum inner product search over label vectors: exact, or approximate with ScaNN.

`index.Index` is the interface; `factory.open_index` loads, builds and tunes one.
"""
