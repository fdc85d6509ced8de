"""Build search trees from candidates by merging the common prefixes of each prompt's candidates.

Shapes:  B prompts   C candidates   S longest sequence and the root   N tree nodes
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64

from orchard import ragged
from orchard.catalog.trie import ROOT
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rollout.candidates import Candidates


def build_search_trees(
    prompts: Prompts,
    candidates: Candidates,
    tokenizer: ItemTokenizer,
    policy: PolicyVersion,
) -> SearchTrees:
    """Build each prompt's tree: a root and one node per trie node on its candidates' paths."""
    catalog, prompt_of = tokenizer.catalog, ragged.row_of(candidates.start)
    # Candidates in lexicographic order of their paths, by prompt.
    order = np.lexsort((*candidates.node.T[::-1], prompt_of))
    # [C, S]: column d is the node at depth d; column 0 is the prompt, which separates the trees.
    path = np.column_stack([prompt_of[order], candidates.node[order]])
    row, step, tree_node = _preorder(path)
    inner = step > 0
    parent = np.full(len(row), SearchTrees.NO_PARENT, dtype=np.int64)
    parent[inner] = tree_node[row[inner], step[inner] - 1]
    state = np.where(inner, path[row, step], ROOT)
    # Trie nodes of all tree nodes but the roots, and of their parents.
    node, above = torch.from_numpy(state[inner]), torch.from_numpy(state[parent[inner]])
    candidate = np.empty(len(order), dtype=np.int64)
    candidate[order] = tree_node[np.arange(len(order)), (path >= 0).sum(1) - 1]
    return SearchTrees(
        prompts=prompts,
        policy=policy,
        catalog=catalog.digest,
        node_start=ragged.starts(np.bincount(path[row, 0], minlength=len(prompts))),
        parent=parent,
        step=step.astype(np.int32),
        state=state,
        token=tokenizer.token_of(node).numpy().astype(np.int32),
        token_start=ragged.starts(inner.astype(np.int64)),
        logprob=candidates.logprob[order][row[inner], step[inner] - 1],
        forced=(catalog.trie.num_children(above) == 1).numpy(),
        candidate=candidate,
        candidate_start=candidates.start,
        leaf=candidates.leaf,
        score=candidates.score,
        cost=candidates.cost,
        value=None if candidates.value is None else _at_nodes(candidates.value[order], row, step),
    )


def _at_nodes(
    value: Float32[np.ndarray, "C D"], row: Int64[np.ndarray, " N"], step: Int64[np.ndarray, " N"]
) -> Float32[np.ndarray, " N"]:
    """Return the value of each tree node, taken from the path that opens it; NaN at a root."""
    node_value = value[row, np.maximum(step - 1, 0)]
    return np.where(step > 0, node_value, np.nan).astype(np.float32)


class _Preorder(NamedTuple):
    """Tree nodes of sorted paths, in preorder."""

    row: Int64[np.ndarray, " N"]
    """Row of the first path through each tree node."""
    step: Int64[np.ndarray, " N"]
    """Column of each tree node."""
    tree_node: Int64[np.ndarray, "C S"]
    """Tree node at each entry of the path table; undefined past the end of a path."""


def _preorder(path: Int64[np.ndarray, "C S"]) -> _Preorder:
    """Merge sorted paths into trees and number their nodes in preorder.

    Trie nodes of one level are numbered in the order of their paths. In sorted paths, a node is
    opened by the first path through it, and the order of opening is preorder.
    """
    # Whether an entry opens a node: its prefix differs from that of the row above.
    opens = np.ones(path.shape, dtype=bool)
    np.logical_or.accumulate(path[1:] != path[:-1], axis=1, out=opens[1:])
    row, step = np.nonzero(opens & (path >= 0))
    tree_node = np.full(path.shape, -1, dtype=np.int64)
    tree_node[row, step] = np.arange(len(row))
    # An entry that opens no node has the node of the row above.
    np.maximum.accumulate(tree_node, axis=0, out=tree_node)
    return _Preorder(row, step, tree_node)
