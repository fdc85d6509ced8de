"""Inputs of the rewards besides the trees, loaded once per reward actor.

Shapes:  I items   K leaves   E width of an embedding
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError, DataError
from orchard.feedback.utilities import PrefixUtilities
from orchard.guide.expert import LeafRows
from orchard.guide.guide import Guide
from orchard.scorers import checkpoint, listwise_ranker, sasrec
from orchard.scorers.listwise_ranker import ListwiseRanker
from orchard.scorers.sasrec import SasRec
from orchard.settings import RewardsConfig, ValueConfig
from rewards.expert_counts import ExpertCounts
from rewards.left_out import PromptUtilities
from rewards.transition_counts import TransitionCounts


@dataclass(frozen=True, kw_only=True)
class RewardContext:
    """Catalog, reward settings, and statistics of the data set's items."""

    catalog: Catalog
    settings: RewardsConfig = field(default_factory=RewardsConfig)
    embedding: Float32[np.ndarray, "I E"] | None = None
    """Embedding of each item; None if the data set has no embeddings."""
    popularity: Int64[np.ndarray, " I"] | None = None
    """Number of training rows with each item as target; None without training rows."""

    transitions: TransitionCounts | None = None
    """Item transitions counted in the training rows; None if no reward uses them."""

    are_counted: bool = True
    """Whether the prompts are among the rows whose transitions are counted."""
    utilities: PrefixUtilities | None = None
    """Utilities of prefixes; None if no reward uses them."""
    first_request: int | None = None
    """Index among the requests of the utilities of the prompt with id 0; None if prompts are not
    among them."""

    guide: Guide | None = None
    """Guide of the policy that training starts from; None if no reward uses it."""
    rows: LeafRows | None = None
    """Rows that the guide counts; None if no reward uses them."""
    first_row: int | None = None
    """Index among `rows` of the prompt with id 0; None if prompts are not among them."""

    match_prefix: bool = False
    """Whether the reward of a step needs all codes before it to match, too."""

    value: ValueConfig | None = None
    """Rewards of the value head; None without a value head."""

    folder: Path = Path()
    """Run folder, which holds the fitted models unless the settings give another path."""

    @cached_property
    def sasrec(self) -> SasRec:
        """Model of the reward `collaborative`; raises as `orchard.scorers.checkpoint.load`."""
        path = self.settings.collaborative.path or self.folder / sasrec.KIND
        return checkpoint.load(SasRec, path, kind=sasrec.KIND, catalog=self.catalog)

    @cached_property
    def listwise_ranker(self) -> ListwiseRanker:
        """Model of the reward `listwise`; raises as `orchard.scorers.checkpoint.load`."""
        path = self.settings.listwise.path or self.folder / listwise_ranker.KIND
        kind = listwise_ranker.KIND
        return checkpoint.load(ListwiseRanker, path, kind=kind, catalog=self.catalog)

    @cached_property
    def leaf_embedding(self) -> Float64[np.ndarray, "K E"]:
        """Unit vector along the mean of the unit vectors of each leaf's items.

        Raises:
            ConfigError: the data set has no embeddings.
            DataError: an embedding has zero or non-finite length, or those of a leaf cancel out.
        """
        if self.embedding is None:
            raise ConfigError(
                "the reward semantic compares item embeddings and the data set has none; "
                "set data.embeddings, or take semantic out of rewards.weights"
            )
        catalog = self.catalog
        unit = self.embedding.astype(np.float64)
        length = np.linalg.norm(unit, axis=1)
        unusable = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
        if len(unusable):
            raise DataError(
                f"the embedding of item {catalog.item_id[unusable[0]]} has length "
                f"{length[unusable[0]]} ({len(unusable)} of {len(catalog)} items), so its "
                "cosine is not defined; give it a finite one that is not zero"
            )
        # Unit vectors of the items, grouped by leaf.
        unit = unit[catalog.item_of_leaf] / length[catalog.item_of_leaf, None]
        total = np.add.reduceat(unit, catalog.leaf_start[:-1])  # [K, E]
        size = np.linalg.norm(total, axis=1, keepdims=True)
        if not (size > 1e-9).all():
            item = catalog.item_of_leaf[catalog.leaf_start[int(np.argmin(size))]]
            raise DataError(
                f"the embeddings of the items that share the leaf of item {catalog.item_id[item]} "
                "cancel each other; repair them"
            )
        return total / size

    @cached_property
    def leaf_popularity(self) -> Int64[np.ndarray, " K"]:
        """Number of training rows whose target is an item of each leaf.

        Raises:
            ConfigError: the counts are missing.
        """
        if self.popularity is None:
            raise ConfigError(
                "the reward popularity_debias needs how often each item is a target of the "
                "training rows; give these counts, or take it out of rewards.weights"
            )
        catalog = self.catalog
        return np.add.reduceat(self.popularity[catalog.item_of_leaf], catalog.leaf_start[:-1])

    @cached_property
    def expert_counts(self) -> ExpertCounts:
        """Counts behind the experts of the guide; raises ConfigError as `ExpertCounts.of`."""
        return ExpertCounts.of(self.guide, self.rows, self.first_row)

    @property
    def prefix_utilities(self) -> PromptUtilities:
        """Utilities of the prefixes of a prompt's candidates.

        Raises:
            ConfigError: they are missing.
        """
        if self.utilities is None:
            raise ConfigError(
                "the reward utility needs utilities of prefixes; give those of the rows, or take "
                'utility out of rewards.weights and set rewards.steps = "match"'
            )
        return PromptUtilities(
            utilities=self.utilities, catalog=self.catalog, first_row=self.first_request
        )

    @property
    def counted_transitions(self) -> TransitionCounts:
        """Item transitions counted in the training rows.

        Raises:
            ConfigError: the counts are missing.
        """
        if self.transitions is None:
            raise ConfigError(
                "the reward transition needs the transition counts of the training rows; give "
                "them, or take it out of rewards.weights"
            )
        return self.transitions
