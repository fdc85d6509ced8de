"""Verifiable rewards: compare each candidate with the next item of the data.

The target is the item of the prompt's own row, so equal histories with different targets are scored
against different targets. Items that share a semantic ID share a leaf, so these rewards cannot
distinguish them.

Shapes:  B prompts   C candidates   D longest sequence
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from orchard.types import SearchTrees
from rewards.context import RewardContext


def rule(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the target's reward for each candidate that is the target, else 0.

    It is 1, except in feedback.
    """
    return _hit(trees, ctx).astype(np.float32) * reward_of_target(trees)


def ranking(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Penalize each miss, most at the best rank (ReRe, arXiv 2510.12211).

    Targets without a positive reward, in feedback, are not to be ranked first: all get 0. With G
    candidates, the miss at rank k gets -(1 / log2(k + 1)) / Z, and the target 0.
    `rewards.ranking_variant` selects one of two forms:

    reference_code  Z = sum_j 1 / log2(j + 1) over all G ranks; 0 in a group without the target.
                    The reference code of ReRe and MiniOneRec (arXiv 2510.24431) computes this.
    paper           Z sums over the misses alone, so that they share -1, in groups without the
                    target too. Standardized, such a group pushes the policy towards its own tail
                    without any evidence.
    """
    hit, is_wanted = _hit(trees, ctx), reward_of_target(trees) > 0
    discount: Float64[np.ndarray, " C"] = 1 / np.log2(trees.rank + 1)
    prompt, num_prompts = trees.prompt_of_candidate, len(trees)
    if ctx.settings.ranking_variant == "paper":
        missed = np.bincount(prompt, weights=np.where(hit, 0, discount), minlength=num_prompts)
        is_missed = ~hit & is_wanted
        share = discount / np.where(hit, 1, missed[prompt])
        return np.where(is_missed, -share, 0).astype(np.float32)
    total = np.bincount(prompt, weights=discount, minlength=num_prompts)
    has_hit = np.bincount(prompt, weights=hit, minlength=num_prompts) > 0
    is_missed = has_hit[prompt] & ~hit & is_wanted
    return np.where(is_missed, -discount / total[prompt], 0).astype(np.float32)


def prefix(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the share of the target's codes in the common prefix of candidate and target.

    An end marker counts as a code, so 1 means a hit and nothing else.
    """
    catalog = ctx.catalog
    target = catalog.codes[trees.prompts.target[trees.prompt_of_candidate]]
    candidate = catalog.codes[catalog.item_of_leaf[catalog.leaf_start[trees.leaf]]]
    same = (candidate == target) & (target >= 0)
    # Length of the common prefix: codes before the first difference.
    common = np.logical_and.accumulate(same, axis=1).sum(1)
    share = (common / (target >= 0).sum(1)).astype(np.float32)
    return share * reward_of_target(trees)


def reward_of_target(trees: SearchTrees) -> Float32[np.ndarray, " C"]:
    """Return the reward of each candidate's target: that of the feedback, or else 1."""
    reward = trees.prompts.reward
    if reward is None:
        return np.ones(len(trees.candidate), np.float32)
    return reward[trees.prompt_of_candidate]


def _hit(trees: SearchTrees, ctx: RewardContext) -> Bool[np.ndarray, " C"]:
    """Return whether each candidate is the target; duplicates of the target all count."""
    target: Int64[np.ndarray, " B"] = ctx.catalog.leaf_of_item[trees.prompts.target]
    return trees.leaf == target[trees.prompt_of_candidate]
