"""Verifiable rewards: a candidate against the item that really came next.

The target is the item of the prompt's own row, so equal histories with different targets are each
judged by their own. Items that share a semantic ID share a leaf and cannot be told apart here.

Shapes:  B prompts   C candidates   D longest sequence
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from orchard.types import SearchTrees
from rewards.context import RewardContext


def rule(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """1 for a candidate that is the target, else 0."""
    return _hit(trees, known).astype(np.float32)


def ranking(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """A penalty for each miss, largest for the best ranked (ReRe, arXiv 2510.12211).

    With G candidates, the miss at rank k gets -(1 / log2(k + 1)) / Z, and the target 0. There are
    two forms, by `rewards.ranking_variant`:

    coded       Z = sum_j 1 / log2(j + 1) over all G ranks; 0 in a group without the target. This is
                what ReRe and MiniOneRec (arXiv 2510.24431) run.
    published   Z sums over the misses alone, so that they share -1; groups without the target
                included. Standardised, such a group pushes the policy towards its own tail, with no
                evidence behind it.
    """
    hit = _hit(trees, known)
    share: Float64[np.ndarray, " C"] = 1 / np.log2(trees.rank + 1)
    prompt, num_prompts = trees.prompt_of_candidate, len(trees)
    if known.settings.ranking_variant == "paper":
        missed = np.bincount(prompt, weights=np.where(hit, 0, share), minlength=num_prompts)
        return np.where(hit, 0, -share / np.where(hit, 1, missed[prompt])).astype(np.float32)
    total = np.bincount(prompt, weights=share, minlength=num_prompts)
    has_hit = np.bincount(prompt, weights=hit, minlength=num_prompts) > 0
    return np.where(has_hit[prompt] & ~hit, -share / total[prompt], 0).astype(np.float32)


def prefix(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """Share of the target's codes that the candidate has in common from the first code on.

    An end marker counts as a code, so 1 means a hit and nothing else.
    """
    catalog = known.catalog
    target = catalog.codes[trees.prompts.target[trees.prompt_of_candidate]]
    candidate = catalog.codes[catalog.item_of_leaf[catalog.leaf_start[trees.leaf]]]
    same = (candidate == target) & (target >= 0)
    common = np.logical_and.accumulate(same, axis=1).sum(1)
    return (common / (target >= 0).sum(1)).astype(np.float32)


def _hit(trees: SearchTrees, known: RewardContext) -> Bool[np.ndarray, " C"]:
    """Candidates that are the target; copies drawn more than once all count."""
    target: Int64[np.ndarray, " B"] = known.catalog.leaf_of_item[trees.prompts.target]
    return trees.leaf == target[trees.prompt_of_candidate]
