"""Auxiliary models that score items or prefixes, and how they are fitted."""
