"""The opinion of a collaborative recommender: SASRec's logit of a candidate after the history.

Shapes:  C candidates
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.scorers.sasrec import leaf_logits
from orchard.types import SearchTrees
from rewards.context import RewardContext


def collaborative(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """Raw logit of each candidate given its prompt's history (ReRe, arXiv 2510.12211).

    A candidate that the scorer does not know gets the mean of those of its group that it knows, so
    that ignorance neither rewards nor punishes; a group of none, or a history without any item that
    it knows, gets 0 throughout.
    """
    prompts, prompt = trees.prompts, trees.prompt_of_candidate
    logit = leaf_logits(
        known.sasrec, known.catalog, prompts.history, prompts.history_start, prompt, trees.leaf
    )
    return no_signal(logit, prompt, len(trees))


def no_signal(
    opinion: Float64[np.ndarray, " C"], prompt: Int64[np.ndarray, " C"], num_prompts: int
) -> Float32[np.ndarray, " C"]:
    """Opinions, with the mean of the finite ones of a prompt, or 0, in the place of the others."""
    sure = np.isfinite(opinion)
    count = np.bincount(prompt[sure], minlength=num_prompts)
    total = np.bincount(prompt[sure], weights=opinion[sure], minlength=num_prompts)
    mean = total / np.maximum(1, count)
    return np.where(sure, opinion, mean[prompt]).astype(np.float32)
