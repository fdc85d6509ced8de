"""Fit and load the small models that score items, lists or prefixes for rewards and searches."""
