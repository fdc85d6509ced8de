"""Register `group_free`, the estimator `group` with forced codes left out of |y|.

A plugin of `orchard bench recipes`, which measures whether the choice matters.
"""

from dataclasses import replace

import numpy as np

from learner.advantage.estimators import ESTIMATORS, EstimatorFacts, candidate_lengths, group
from orchard.types import Advantages, ScoredTrees


@ESTIMATORS.register("group_free", EstimatorFacts(by_group=True))
def group_free(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Weigh each candidate by 1 / (N |y|), where |y| counts its free codes only."""
    trees = scored.trees
    # [S + 1] number of free tokens before each token: the starts of nodes among free tokens alone
    before = np.concatenate([[0], np.cumsum(~trees.forced)])
    free = candidate_lengths(replace(trees, token_start=before[trees.token_start]))
    advantages = group(scored, std_epsilon)
    factor = np.where(free > 0, candidate_lengths(trees) / np.maximum(free, 1), 0.0)
    return replace(advantages, weight=(advantages.weight * factor[:, None]).astype(np.float32))
