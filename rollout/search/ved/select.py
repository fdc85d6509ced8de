"""Select the final candidates of a value-guided search.

Shapes:  B prompts   K completions
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.types import Cost
from rollout.candidates import Candidates
from rollout.search.beam import collect
from rollout.search.topk import sort_by_score
from rollout.search.ved.tree import VedTree


def select_candidates(
    trie: Trie, tree: VedTree, count: int, num_prompts: int, cost: Cost, *, likelihood: bool = False
) -> Candidates:
    """Select the `count` visited leaves of highest value per prompt, sorted by log-probability.

    If too few leaves were visited, free leaves below visited prefixes complete them. Their
    log-probabilities are already computed, so completion needs no forward pass. With `likelihood`,
    leaves are selected by the sum of log-probability and value.
    """
    leaf = np.flatnonzero(tree.is_leaf)
    worth = tree.value[leaf] + (tree.score[leaf] if likelihood else 0.0)
    order = np.lexsort((tree.node[leaf], -tree.score[leaf], -worth, tree.prompt[leaf]))
    leaf = leaf[order]  # visited leaves, best first within each prompt
    num_visited = np.bincount(tree.prompt[leaf], minlength=num_prompts)
    leaf = leaf[ragged.index_in_row(ragged.starts(num_visited)) < count]
    entry, owner, below = _completions(trie, tree, count - np.minimum(num_visited, count))
    # Visited leaves, followed by completions.
    prompt = np.concatenate([tree.prompt[leaf], tree.prompt[owner]])
    node = np.concatenate([tree.node[leaf], below])
    logprob, value = tree.branches(np.concatenate([leaf, owner]), trie.depth)
    completed = np.arange(len(leaf), len(prompt))
    logprob[completed, tree.depth[owner]] = tree.child_logprob[entry]
    score = np.concatenate([tree.score[leaf], tree.score[owner] + tree.child_logprob[entry]])
    order = sort_by_score(
        torch.from_numpy(prompt), torch.from_numpy(score), torch.from_numpy(node)
    ).numpy()
    device = trie.code.device
    candidates = collect(
        trie,
        torch.from_numpy(prompt[order]).to(device),
        torch.from_numpy(node[order]).to(device),
        torch.from_numpy(logprob[order]).to(device),
        torch.from_numpy(score[order]).to(device),
        num_prompts,
        cost + Cost(counts={"completed": len(entry)}),
    )
    return replace(candidates, value=value[order])


class _Completions(NamedTuple):
    """Free leaves that complete the candidates."""

    entry: Int64[np.ndarray, " K"]
    """Index of each leaf among the children of all nodes."""
    owner: Int64[np.ndarray, " K"]
    """Tree node that each leaf is a child of."""
    node: Int64[np.ndarray, " K"]
    """Trie node of each leaf."""


def _completions(trie: Trie, tree: VedTree, missing: Int64[np.ndarray, " B"]) -> _Completions:
    """Select `missing` free children that are leaves for each prompt.

    The likeliest leaf of each prefix comes before the second likeliest of any prefix, and prefixes
    of high value come first.
    """
    short = np.flatnonzero(missing[tree.prompt] > 0)  # nodes of prompts with too few leaves
    entry, owner = tree.free_children(short)
    owner = short[owner]
    below = trie.descend(torch.from_numpy(tree.child[entry]).to(trie.code.device))
    is_leaf = (trie.num_children(below) == 0).cpu().numpy()
    entry, owner, node = entry[is_leaf], owner[is_leaf], below.cpu().numpy()[is_leaf]
    # Rank of each leaf among those of its prefix, by log-probability.
    order = np.lexsort((node, -tree.child_logprob[entry], owner))
    entry, owner, node = entry[order], owner[order], node[order]
    rank = ragged.index_in_row(ragged.starts(np.bincount(owner, minlength=len(tree))))
    # Rank among all leaves of the prompt.
    order = np.lexsort((node, -tree.score[owner], -tree.value[owner], rank, tree.prompt[owner]))
    entry, owner, node = entry[order], owner[order], node[order]
    prompt = tree.prompt[owner]
    rank = ragged.index_in_row(ragged.starts(np.bincount(prompt, minlength=len(missing))))
    kept = rank < missing[prompt]
    return _Completions(entry[kept], owner[kept], node[kept])
