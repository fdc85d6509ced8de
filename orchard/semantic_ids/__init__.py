"""Build semantic IDs: embed items, quantize the embeddings, resolve collisions, write a report.

titles or interactions -> embedding -> codes -> distinct codes -> items.parquet, sids.json
"""
