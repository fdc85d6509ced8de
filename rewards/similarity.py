"""Rewards that compare items: with the target, with each other, with what is popular.

None of them looks at whether a candidate is right, so that each alone can be raised by ever worse
lists; give them a smaller weight than `rule`. `docs/rewards.md` has their formulas and hazards.

Shapes:  B prompts   C candidates   D longest sequence
"""

import numpy as np
import torch
from jaxtyping import Float32

from orchard.types import SearchTrees
from rewards.context import RewardContext


def semantic(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """Cosine between the embeddings of candidate and target, -1 to 1 (ReRe, arXiv 2510.12211).

    The embedding of a leaf is the mean direction of its items, so the target's own leaf gets 1.
    """
    embedding, target = known.leaf_embedding, known.catalog.leaf_of_item[trees.prompts.target]
    other = embedding[target][trees.prompt_of_candidate]
    return np.einsum("ce,ce->c", embedding[trees.leaf], other).astype(np.float32)


def diversity(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """Mean share of a candidate's codes that each other candidate of its group does not share.

    1 - LCP / length, with LCP the number of leading codes in common; 1 where all others begin
    otherwise, 0 where all are copies or there is no other. Where all sequences are of one length,
    the mean over a group is `orchard.evaluation.ranking.diversity` of its list.
    """
    trie, prompt = known.catalog.trie, trees.prompt_of_candidate
    path = trie.path(trie.node_of(torch.from_numpy(trees.leaf))).numpy()
    inside = path >= 0
    key = np.where(inside, path + (prompt * trie.num_nodes)[:, None], -1)
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    sharing = np.where(inside, count[place.reshape(key.shape)] - 1, 0).sum(1)
    others = np.diff(trees.candidate_start)[prompt] - 1
    pairs = np.maximum(1, others * inside.sum(1))
    return np.where(others > 0, 1 - sharing / pairs, 0).astype(np.float32)


def popularity_debias(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """How rare a candidate is among the targets of training: 1 if it never was one, 0 if the most.

    1 - log(1 + n) / log(1 + max n) with n its leaf's count: self-information, a measure of novelty
    (Vargas and Castells, RecSys 2011), on a scale from 0 to 1.
    """
    count = known.leaf_popularity
    most = np.log1p(max(1, int(count.max(initial=0))))
    return (1 - np.log1p(count[trees.leaf]) / most).astype(np.float32)
