r"""Advantages of logged draws: self-normalized, truncated importance weights (SNIPS).

The reward of a policy pi is estimated from items y_i that another policy q has drawn after h_i,
with rewards r_i, by

    V = sum_i w_i r_i / sum_i w_i,    w_i = min(pi(y_i | h_i) / q(y_i | h_i), c)

(Swaminathan, Joachims, "The self-normalized estimator for counterfactual learning", NIPS 2015), and
its gradient, where c does not bind, is

    grad V = sum_i w_i (r_i - V) grad log pi(y_i | h_i) / sum_i w_i

so that the advantage of a draw is N w_i (r_i - V) / sum_j w_j, with N draws in the batch: draws
that the policy would not make say little, and V is its baseline. c = `learner.weight_clip` bounds
what one draw may weigh; it makes the estimate cautious where the two policies differ. Advantages
are of the policy that scored the draws; ratio and clip of the loss are relative to it, as after a
search.

Shapes:  C candidates, one a prompt
"""

import numpy as np
from jaxtyping import Float64

from orchard.errors import DataError
from orchard.types import ScoredTrees


def importance_weights(scored: ScoredTrees, clip: float) -> Float64[np.ndarray, " C"]:
    """Return the truncated weight of each draw.

    Raises:
        DataError: prompts do not say with which probability their target was shown.
    """
    trees = scored.trees
    if trees.prompts.logged is None:
        raise DataError(
            "the prompts are not logged draws with a known probability; train on data.feedback "
            'with rollout.search = "logged"'
        )
    logged = trees.prompts.logged.astype(np.float64)[trees.prompt_of_candidate]
    log_weight = trees.score.astype(np.float64) - logged
    return np.exp(np.minimum(log_weight, np.log(clip)))


def snips_advantages(scored: ScoredTrees, clip: float) -> Float64[np.ndarray, " C"]:
    """Return the advantage of each draw; 0 where no draw has a weight.

    Raises:
        DataError: as `importance_weights`.
    """
    weight, reward = importance_weights(scored, clip), scored.reward.astype(np.float64)
    total = weight.sum()
    if total <= 0:
        return np.zeros(len(weight))
    mean = (weight * reward).sum() / total
    return len(weight) * weight * (reward - mean) / total
