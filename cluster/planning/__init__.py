"""Capacity plans and scaling simulations of runs."""
