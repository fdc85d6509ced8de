"""Served policies: hot reload and A/B assignment."""
