"""Similarity rewards: compare candidates with the target, each other, or item popularity.

None of them checks whether a candidate is the target, so that ever worse lists can raise each one
alone; give them a smaller weight than `rule`. `docs/rewards.md` has their formulas and hazards.

Shapes:  B prompts   C candidates   D longest sequence
"""

import numpy as np
import torch
from jaxtyping import Float32

from orchard.types import SearchTrees
from rewards.context import RewardContext


def semantic(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the cosine of candidate and target embeddings, -1 to 1 (ReRe, arXiv 2510.12211).

    The embedding of a leaf is the mean direction of its items, so the target's own leaf gets 1.
    """
    embedding, target = ctx.leaf_embedding, ctx.catalog.leaf_of_item[trees.prompts.target]
    target_embedding = embedding[target][trees.prompt_of_candidate]
    return np.einsum("ce,ce->c", embedding[trees.leaf], target_embedding).astype(np.float32)


def diversity(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the mean share of a candidate's codes outside its common prefix with each other one.

    1 - LCP / length, averaged over the other candidates of the group, with LCP the length of the
    longest common prefix. It is 1 if no other candidate starts with the same code, and 0 if all
    are duplicates or there is no other candidate. If all sequences have the same length, the mean
    over a group equals `orchard.evaluation.ranking.diversity` of its list.
    """
    trie, prompt = ctx.catalog.trie, trees.prompt_of_candidate
    path = trie.path(trie.node_of(torch.from_numpy(trees.leaf))).numpy()
    inside = path >= 0
    # (prompt, node) of each candidate at each depth, -1 past its end.
    key = np.where(inside, path + (prompt * trie.num_nodes)[:, None], -1)
    _, key_index, count = np.unique(key, return_inverse=True, return_counts=True)
    # Summed over depths, the other candidates that share the node: the sum of all LCPs.
    sharing = np.where(inside, count[key_index.reshape(key.shape)] - 1, 0).sum(1)
    others = np.diff(trees.candidate_start)[prompt] - 1
    pairs = np.maximum(1, others * inside.sum(1))
    return np.where(others > 0, 1 - sharing / pairs, 0).astype(np.float32)


def popularity_debias(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the rarity of a candidate as a training target: 1 if never, 0 if most frequent.

    1 - log(1 + n) / log(1 + max n) with n the count of its leaf: self-information, a measure of
    novelty (Vargas and Castells, RecSys 2011), on a scale from 0 to 1.
    """
    count = ctx.leaf_popularity
    log_max = np.log1p(max(1, int(count.max(initial=0))))
    return (1 - np.log1p(count[trees.leaf]) / log_max).astype(np.float32)
