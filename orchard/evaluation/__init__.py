"""Ranking metrics, bootstrap intervals, off-policy estimates, diagnostics."""
