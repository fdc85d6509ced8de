"""Item catalog: semantic IDs, the trie of legal code sequences, and versions of both."""
