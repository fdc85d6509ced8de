"""Semantic IDs for a data set: embed its items, quantise the residuals, settle collisions, report.

titles or interactions -> embedding -> codes -> distinct codes -> items.parquet, sids.json
"""
