"""Decoding: request resolution, batching, scheduling and search."""
