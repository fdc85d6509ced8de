"""Experts that count, and the guide: their weighted reward as values of prefixes in a search."""
