"""Rewards of candidates, and the Ray actors that compute them."""
