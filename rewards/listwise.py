"""Reward from a listwise ranker, which reads all candidates of a prompt together.

Shapes:  C candidates   U distinct leaves of all prompts
"""

import numpy as np
import torch
from jaxtyping import Float32

from orchard import ragged
from orchard.types import SearchTrees
from rewards.collaborative import no_signal
from rewards.context import RewardContext


def listwise(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the log-probability that the user takes each candidate out of its prompt's list.

    Duplicate candidates are scored once and share their reward. Candidates unknown to the ranker
    are left out of its list and get the mean of the others; all candidates get 0 if the history has
    no known item.
    """
    prompts, catalog = trees.prompts, ctx.catalog
    key = trees.prompt_of_candidate * catalog.trie.num_leaves + trees.leaf
    # Distinct (prompt, leaf) pairs, and the pair of each candidate.
    distinct, pair_of_candidate = np.unique(key, return_inverse=True)
    prompt_of_pair, leaf = np.divmod(distinct, catalog.trie.num_leaves)
    start = ragged.starts(np.bincount(prompt_of_pair, minlength=len(trees)))
    with torch.no_grad():
        logprob = ctx.listwise_ranker.score(prompts.history, prompts.history_start, leaf, start)
    return no_signal(
        logprob.double().numpy()[pair_of_candidate], trees.prompt_of_candidate, len(trees)
    )
