"""SearchTrees -> ScoredTrees: what each candidate is worth.

To add a reward, write a function of the type `Reward` in a module of this package and give it a
name in `REWARDS`; the name is then a key of `rewards.weights` in a run file.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from orchard.catalogue import Catalogue
from orchard.types import SearchTrees
from rewards.rule import prefix, ranking, rule

Reward = Callable[[SearchTrees, Catalogue], Float32[np.ndarray, " C"]]
"""One finite number per candidate, larger for better; all candidates of a batch at once."""

REWARDS: dict[str, Reward] = {
    "rule": rule,
    "ranking": ranking,
    "prefix": prefix,
}

__all__ = ["REWARDS", "Reward"]
