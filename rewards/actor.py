"""The Ray shell of the room: holds the catalogue and the weights, judges what it is sent."""

from collections.abc import Mapping
from typing import Any

import ray

from orchard.catalogue import Catalogue
from orchard.types import ScoredTrees, SearchTrees
from rewards.reward import check, score


class Judge:
    """Scores trees with fixed weights; without state, so that any call may be repeated anywhere."""

    def __init__(self, weights: Mapping[str, float], catalogue: Catalogue) -> None:
        """Refuse unknown rewards at once; raises ConfigError."""
        check(weights)
        self._weights = dict(weights)
        self._catalogue = catalogue

    def score(self, trees: SearchTrees) -> ScoredTrees:
        """As `rewards.reward.score`."""
        return score(trees, self._catalogue, self._weights)


RewardActor: Any = ray.remote(Judge)
