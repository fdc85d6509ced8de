"""Benchmarks of speed and memory: two ways to do the same, measured side by side."""
