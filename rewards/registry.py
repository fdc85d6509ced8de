"""SearchTrees -> ScoredTrees: what each candidate is worth.

To add a reward, write a function of the type `Reward` in a module of this package and give it a
name in `REWARDS`; the name is then a key of `rewards.weights` in a run file. What it looks up
beyond trees and catalog is a property of `Knowledge`, named in `NEEDS` so that its absence is
found before anything starts. `docs/rewards.md` has an example.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from orchard.types import SearchTrees
from rewards.collaborative import collaborative
from rewards.context import RewardContext
from rewards.listwise import listwise
from rewards.rule import prefix, ranking, rule
from rewards.similarity import diversity, popularity_debias, semantic
from rewards.transition import transition

Reward = Callable[[SearchTrees, RewardContext], Float32[np.ndarray, " C"]]
"""One finite number per candidate, larger for better; all candidates of a batch at once."""

REWARDS: dict[str, Reward] = {
    "rule": rule,
    "ranking": ranking,
    "prefix": prefix,
    "semantic": semantic,
    "collaborative": collaborative,
    "transition": transition,
    "listwise": listwise,
    "diversity": diversity,
    "popularity_debias": popularity_debias,
}

REQUIREMENTS: dict[str, Callable[[RewardContext], object]] = {
    "semantic": lambda known: known.leaf_embedding,
    "collaborative": lambda known: known.sasrec,
    "transition": lambda known: known.counted_transitions,
    "listwise": lambda known: known.listwise_ranker,
    "popularity_debias": lambda known: known.leaf_popularity,
}
"""What a reward looks up, for those that do; raises a sentence where it is not there."""

__all__ = ["REQUIREMENTS", "REWARDS", "Reward", "RewardContext"]
