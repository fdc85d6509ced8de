"""The Ray shell of the room: holds what rewards look up, and judges what it is sent."""

from typing import Any

import ray

from orchard.types import ScoredTrees, SearchTrees
from rewards.context import RewardContext
from rewards.score import preload, score_trees


class RewardWorker:
    """Scores trees with fixed weights; without state, so that any call may be repeated anywhere."""

    def __init__(self, known: RewardContext) -> None:
        """Load what the weighted rewards need.

        Raises:
            ConfigError, DataError, CatalogError: a reward is unknown, or what it needs is missing
                or another catalog's.
        """
        self._known, self._weights = known, dict(known.settings.weights)
        preload(self._weights, known)

    def score(self, trees: SearchTrees) -> ScoredTrees:
        """As `rewards.score.score`."""
        return score_trees(trees, self._known, self._weights)


RewardActor: Any = ray.remote(RewardWorker)
