"""Parquet and arrow files: read in bounded memory, whatever they claim or expand to.

`parquet_file` and `arrow_file` yield record batches, `cells` turns them into Python values.
"""
