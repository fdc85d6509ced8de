"""Rewards of candidates and of steps, and the actors that compute them."""
