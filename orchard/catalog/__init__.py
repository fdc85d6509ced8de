"""The item catalog: semantic IDs, the trie of legal sequences, and versions of both."""
