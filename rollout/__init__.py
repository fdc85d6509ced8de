"""Rollouts: trie-constrained search algorithms, inference engines, and the rollout actor."""
