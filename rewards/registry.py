"""Registry of the reward functions, by their name in `rewards.weights`.

To add a reward, write a function of the type `Reward` in a module of this package and register it
in `REWARDS`; its name is then a key of `rewards.weights` in a run file. If the reward needs more
than the trees and the catalog, add a property to `RewardContext` and list it in `REQUIREMENTS`, so
that a missing input stops the run before it starts. `docs/rewards.md` has an example.
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
"""Function from the trees of a batch to one finite number per candidate, larger for better."""

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
    "semantic": lambda ctx: ctx.leaf_embedding,
    "collaborative": lambda ctx: ctx.sasrec,
    "transition": lambda ctx: ctx.counted_transitions,
    "listwise": lambda ctx: ctx.listwise_ranker,
    "popularity_debias": lambda ctx: ctx.leaf_popularity,
}
"""Loader of the input of each reward that needs one; raises an OrchardError if it is missing."""

__all__ = ["REQUIREMENTS", "REWARDS", "Reward", "RewardContext"]
