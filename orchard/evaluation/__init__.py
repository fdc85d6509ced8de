"""Compute ranking metrics, bootstrap intervals, off-policy estimates and search diagnostics."""
