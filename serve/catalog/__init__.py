"""Served catalog: versions, deltas, attributes and filters."""
