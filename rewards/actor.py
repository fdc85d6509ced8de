"""Worker of a reward actor, which loads the inputs of the rewards once and scores search trees."""

from collections.abc import Sequence

from orchard.registry import import_plugins
from orchard.types import ScoredTrees, SearchTrees
from rewards.context import RewardContext
from rewards.score import preload, score_all


class RewardWorker:
    """Stateless scorer of trees with fixed weights; any actor may repeat any call."""

    def __init__(self, ctx: RewardContext, plugins: Sequence[str] = ()) -> None:
        """Import the modules that register rewards, and load the inputs of the weighted ones.

        Raises:
            ConfigError, DataError, CatalogError: a plugin or reward is unknown, or its input is
                missing or belongs to another catalog.
        """
        import_plugins(plugins)
        self._ctx, self._weights = ctx, dict(ctx.settings.weights)
        preload(self._weights, ctx)

    def score(self, trees: SearchTrees) -> ScoredTrees:
        """Score the candidates of trees, their steps and, with a value head, their nodes."""
        return score_all(trees, self._ctx, self._weights)
