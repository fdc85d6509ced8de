"""Prompts to search trees: search under the trie, the engines that forward it, and the actor."""
