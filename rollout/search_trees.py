"""Candidates to search trees: what several candidates of a prompt share becomes one node.

Shapes:  B prompts   C candidates   S longest sequence and the root   N tree nodes
"""

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
    catalog, owner = tokenizer.catalog, ragged.owners(candidates.start)
    order = np.lexsort((*candidates.node.T[::-1], owner))
    # Column d is the node at depth d; the root's column tells the prompts apart.
    path = np.column_stack([owner[order], candidates.node[order]])
    row, step, at = _preorder(path)
    inner = step > 0
    parent = np.full(len(row), SearchTrees.NO_PARENT, dtype=np.int64)
    parent[inner] = at[row[inner], step[inner] - 1]
    state = np.where(inner, path[row, step], ROOT)
    here, above = torch.from_numpy(state[inner]), torch.from_numpy(state[parent[inner]])
    candidate = np.empty(len(order), dtype=np.int64)
    candidate[order] = at[np.arange(len(order)), (path >= 0).sum(1) - 1]
    return SearchTrees(
        prompts=prompts,
        policy=policy,
        catalog=catalog.digest,
        node_start=ragged.starts(np.bincount(path[row, 0], minlength=len(prompts))),
        parent=parent,
        step=step.astype(np.int32),
        state=state,
        token=tokenizer.token_of(here).numpy().astype(np.int32),
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
    """The value of each node, which is that of its step on any path through it; NaN at a root."""
    at = value[row, np.maximum(step - 1, 0)]
    return np.where(step > 0, at, np.nan).astype(np.float32)


def _preorder(
    path: Int64[np.ndarray, "C S"],
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"], Int64[np.ndarray, "C S"]]:
    """Merge sorted paths into trees, numbered in preorder.

    Trie nodes of one level are numbered in the order of their paths. In paths sorted by them, the
    first path through a node opens it, and the order of opening is preorder.

    Returns:
        The row and the column that open each tree node, and the tree node at each place of the
        table (any number where a path has ended).
    """
    fresh = np.ones(path.shape, dtype=bool)
    np.logical_or.accumulate(path[1:] != path[:-1], axis=1, out=fresh[1:])
    row, step = np.nonzero(fresh & (path >= 0))
    at = np.full(path.shape, -1, dtype=np.int64)
    at[row, step] = np.arange(len(row))
    np.maximum.accumulate(at, axis=0, out=at)
    return row, step, at
