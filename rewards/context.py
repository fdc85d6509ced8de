"""What a reward may look at beside the trees, loaded once by whoever judges.

Shapes:  I items   K leaves   E width of an embedding
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.scorers import listwise_ranker, sasrec
from orchard.scorers.listwise_ranker import ListwiseRanker
from orchard.scorers.sasrec import SasRec
from orchard.settings import RewardsConfig
from rewards.transition_counts import TransitionCounts


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """The catalog, the settings of the rewards, and what the data set says of its items."""

    catalog: Catalog
    settings: RewardsConfig = field(default_factory=RewardsConfig)
    embedding: Float32[np.ndarray, "I E"] | None = None
    """Of each item, where the data set has embeddings."""
    popularity: Int64[np.ndarray, " I"] | None = None
    """How often each item is a target of the training rows, where there are such rows."""

    transitions: TransitionCounts | None = None
    """What followed what in the training rows, where a reward asks for it."""

    folder: Path = Path()
    """Of the run, where fitted models lie unless the settings say otherwise."""

    @cached_property
    def sasrec(self) -> SasRec:
        """The model behind `collaborative`; raises as `orchard.scorers.sasrec.load`."""
        path = self.settings.collaborative.path or self.folder / sasrec.KIND
        return sasrec.load(path, self.catalog)

    @cached_property
    def listwise_ranker(self) -> ListwiseRanker:
        """The model behind `listwise`; raises as `orchard.scorers.listwise_ranker.load`."""
        path = self.settings.listwise.path or self.folder / listwise_ranker.KIND
        return listwise_ranker.load(path, self.catalog)

    @cached_property
    def leaf_embedding(self) -> Float64[np.ndarray, "K E"]:
        """Unit vector along the mean of the unit vectors of a leaf's items.

        Raises:
            ConfigError: the data set has no embeddings.
            DataError: an embedding has no direction, or those of a leaf cancel each other.
        """
        if self.embedding is None:
            raise ConfigError(
                "the reward semantic compares item embeddings and the data set has none; "
                "set data.embeddings, or take semantic out of rewards.weights"
            )
        items = self.catalog
        unit = self.embedding.astype(np.float64)
        length = np.linalg.norm(unit, axis=1)
        unusable = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
        if len(unusable):
            raise DataError(
                f"the embedding of item {items.item_id[unusable[0]]} has length "
                f"{length[unusable[0]]} ({len(unusable)} of {len(items)} items), so that no cosine "
                "is defined; give it a finite one that is not zero"
            )
        unit = unit[items.item_of_leaf] / length[items.item_of_leaf, None]
        total = np.add.reduceat(unit, items.leaf_start[:-1])
        size = np.linalg.norm(total, axis=1, keepdims=True)
        if not (size > 1e-9).all():
            item = items.item_of_leaf[items.leaf_start[int(np.argmin(size))]]
            raise DataError(
                f"the embeddings of the items that share the leaf of item {items.item_id[item]} "
                "cancel each other; repair them"
            )
        return total / size

    @cached_property
    def leaf_popularity(self) -> Int64[np.ndarray, " K"]:
        """How often an item of each leaf is a target of the training rows.

        Raises:
            ConfigError: the counts are not known.
        """
        if self.popularity is None:
            raise ConfigError(
                "the reward popularity_debias needs how often each item is a target of the "
                "training rows; give these counts, or take it out of rewards.weights"
            )
        items = self.catalog
        return np.add.reduceat(self.popularity[items.item_of_leaf], items.leaf_start[:-1])

    @property
    def counted_transitions(self) -> TransitionCounts:
        """What followed what in the training rows.

        Raises:
            ConfigError: it was not counted.
        """
        if self.transitions is None:
            raise ConfigError(
                "the reward transition needs what followed what in the training rows; give these "
                "counts, or take it out of rewards.weights"
            )
        return self.transitions
