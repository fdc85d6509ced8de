"""Read columns of text tables, JSON lines and Parquet, whole or in parts, into Arrow tables.

Identifiers are dictionary-encoded text, and files are read in blocks, so that memory holds the
columns that are asked for alone.
"""
