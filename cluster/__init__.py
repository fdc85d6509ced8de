"""Composition root: the package that imports all others, and the command line."""
