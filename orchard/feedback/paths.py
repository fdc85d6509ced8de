"""Paths of leaves in the trie of semantic IDs.

Shapes:  Q leaves   N nodes   D1 = D + 1, the root and the codes of the longest item
"""

import numpy as np
import torch
from jaxtyping import Int64

from orchard.catalog.trie import ROOT, Trie


def paths_of(trie: Trie, leaf: Int64[np.ndarray, " Q"]) -> Int64[np.ndarray, "Q D1"]:
    """Return the nodes from the root down to each leaf, -1 past its depth."""
    path = trie.path(trie.node_of(torch.from_numpy(leaf))).numpy()
    return np.concatenate([np.full((len(leaf), 1), ROOT), path], axis=1)


def leaves_below(trie: Trie) -> Int64[np.ndarray, " N"]:
    """Count the leaves at or below each node."""
    path = paths_of(trie, np.arange(trie.num_leaves))
    return np.bincount(path[path >= 0], minlength=trie.num_nodes)


def forced_nodes(trie: Trie) -> Int64[np.ndarray, " N"]:
    """Return 1 for each node whose code has no alternative, else 0; 0 at the root."""
    node = torch.arange(trie.num_nodes)
    only = trie.num_children(trie.parent(node)) == 1
    only[ROOT] = False
    return only.numpy().astype(np.int64)
