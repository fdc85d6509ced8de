"""HTTP service for recommendations from a trained policy."""
