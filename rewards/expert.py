"""Reward from the experts of the policy's guide, without what they know from the row itself.

The reward `transition` is the special case of one expert with one term, up to a constant.

Shapes:  B prompts   C candidates
"""

import numpy as np
from jaxtyping import Float32

from orchard import ragged
from orchard.types import SearchTrees
from rewards.context import RewardContext


def expert(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the guide's r of each candidate, as if its prompt had not been counted.

    r(h, y) = sum over terms of w log(1 + e(h, y) / eps) + w_popularity log(1 + n(y))
              + w_seen [y in h], divided by the sum of |w| over the terms

    so that it is a mean of log(1 + e / eps), in the range of `transition`, however sure the fit
    is. A prompt's own row is left out of counted transitions and of n, and all rows of its user
    out of the other experts; as in the guide, r is 0 after a history that no expert then knows.
    """
    counts = ctx.expert_counts
    guide, prompts, leaf_of_item = counts.guide, trees.prompts, ctx.catalog.leaf_of_item
    prompt, leaf = trees.prompt_of_candidate, trees.leaf
    history, start = leaf_of_item[prompts.history].astype(np.int64), prompts.history_start
    own, num_prompts = counts.own_row(prompts), len(prompts)
    known = np.zeros(num_prompts, np.bool_)
    score = np.zeros((len(leaf), len(guide.experts)))
    for index, (counted, read) in enumerate(zip(counts.counted, guide.experts, strict=True)):
        remaining = counted.without(*counts.left_out(own, counted.unit))
        recent, bounds = ragged.last(history, start, read.window)
        owner = ragged.row_of(bounds)
        known[owner[remaining.known(owner, recent)]] = True
        # One entry for each pair of a candidate and a recent item of its prompt's history.
        length = np.diff(bounds)[prompt]
        candidate = np.repeat(np.arange(len(leaf)), length)
        item = ragged.ranges(bounds[prompt], length)
        age = bounds[1:][prompt[candidate]] - 1 - item
        strength = remaining.strength(prompt[candidate], recent[item], leaf[candidate])
        weight = strength * read.decay ** age.astype(np.float64)
        score[:, index] = np.bincount(candidate, weight, minlength=len(leaf))
    is_own = (own[prompt] >= 0) & (leaf == leaf_of_item[prompts.target][prompt])
    total = guide.popularity_weight * np.log1p(counts.popularity[leaf] - is_own)
    total += guide.seen_weight * ragged.contains(history, start, prompt, leaf)
    for term, column in zip(guide.terms, guide.column, strict=True):
        total += term.weight * np.log1p(score[:, column] / term.scale)
    total[~known[prompt]] = 0.0
    scale = sum(abs(term.weight) for term in guide.terms) or 1.0
    return (total / scale).astype(np.float32)
