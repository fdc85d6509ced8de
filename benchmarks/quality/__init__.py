"""Benchmarks of recommendation quality: policies trained in different ways, on equal rows."""
