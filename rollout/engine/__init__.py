"""Inference engines that decode under the trie: torch, paged, vLLM."""
