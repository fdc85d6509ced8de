"""The opinion of a model that reads all candidates of a prompt together.

Shapes:  C candidates   U distinct leaves of all prompts
"""

import numpy as np
import torch
from jaxtyping import Float32

from orchard import ragged
from orchard.types import SearchTrees
from rewards.collaborative import no_signal
from rewards.context import RewardContext


def listwise(trees: SearchTrees, known: RewardContext) -> Float32[np.ndarray, " C"]:
    """Log-probability that the user takes this candidate of those in the list.

    Candidates that repeat one another are read once and share their reward. What the evaluator does
    not know is not in its list, and gets the mean of what is; a history without any item that it
    knows gets 0 throughout.
    """
    prompts, items = trees.prompts, known.catalog
    key = trees.prompt_of_candidate * items.trie.num_leaves + trees.leaf
    distinct, place = np.unique(key, return_inverse=True)
    owner, leaf = np.divmod(distinct, items.trie.num_leaves)
    start = ragged.starts(np.bincount(owner, minlength=len(trees)))
    with torch.no_grad():
        found = known.listwise_ranker.score(prompts.history, prompts.history_start, leaf, start)
    return no_signal(found.double().numpy()[place], trees.prompt_of_candidate, len(trees))
