"""Reward from a collaborative recommender: SASRec's logit of a candidate after the history.

Shapes:  C candidates
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.scorers.sasrec import leaf_logits
from orchard.types import SearchTrees
from rewards.context import RewardContext


def collaborative(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the raw logit of each candidate given its prompt's history (ReRe, arXiv 2510.12211).

    A candidate unknown to the scorer gets the mean of the known candidates of its group, so that a
    missing score neither rewards nor punishes. All candidates get 0 if the group has no known
    candidate or the history no known item.
    """
    prompts, prompt = trees.prompts, trees.prompt_of_candidate
    logit = leaf_logits(
        ctx.sasrec, ctx.catalog, prompts.history, prompts.history_start, prompt, trees.leaf
    )
    return no_signal(logit, prompt, len(trees))


def no_signal(
    score: Float64[np.ndarray, " C"], prompt: Int64[np.ndarray, " C"], num_prompts: int
) -> Float32[np.ndarray, " C"]:
    """Replace non-finite scores by the mean finite score of their prompt, or 0 if it has none."""
    finite = np.isfinite(score)
    count = np.bincount(prompt[finite], minlength=num_prompts)
    total = np.bincount(prompt[finite], weights=score[finite], minlength=num_prompts)
    mean = total / np.maximum(1, count)
    return np.where(finite, score, mean[prompt]).astype(np.float32)
