"""Readers of data sources: tabular files, the XML repository's layout, public data sets, glyphs.

Each of them returns a `raw.RawDataset`, which `vixml_jax.data.preprocessing` prepares.
"""
