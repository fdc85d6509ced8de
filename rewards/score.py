"""Score trees by the weighted sum of rewards, and keep the terms of the sum for the log.

Shapes:  C candidates
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, DataError
from orchard.types import ScoredTrees, SearchTrees
from rewards.registry import REWARDS, RewardContext
from rewards.steps import add_step_rewards, with_step_rewards
from rewards.utility import step_utilities
from rewards.values import add_value_rewards


def check_rewards(weights: Mapping[str, float]) -> None:
    """Raise ConfigError, with the nearest name, if a weight is of an unknown reward."""
    for name in weights:
        REWARDS.check_name(name, "rewards.weights")


def preload(weights: Mapping[str, float], ctx: RewardContext) -> None:
    """Load the inputs of the weighted rewards, so that a missing one is reported before scoring.

    Raises:
        ConfigError, DataError, CatalogError: a reward is unknown, or its input is missing or
            belongs to another catalog.
    """
    check_rewards(weights)
    for name in weights:
        load = REWARDS.facts(name).load
        if load is not None:
            load(ctx)
    if ctx.settings.steps == "utility":
        _ = ctx.prefix_utilities


def score_trees(
    trees: SearchTrees, ctx: RewardContext | Catalog, weights: Mapping[str, float]
) -> ScoredTrees:
    """Score every candidate; a reward of weight 0 is computed for the log only.

    A bare catalog is enough for rewards that load nothing.

    Raises:
        ConfigError: a weight is of an unknown reward.
        CatalogError: the trees were built on another catalog, whose leaves are other items.
        DataError: a reward is not finite.
    """
    check_rewards(weights)
    if isinstance(ctx, Catalog):
        ctx = RewardContext(catalog=ctx)
    if trees.catalog != ctx.catalog.digest:
        raise CatalogError(
            f"the trees were built on catalog {trees.catalog[:12]}, the rewards use "
            f"{ctx.catalog.digest[:12]}; start both from the same items file"
        )
    parts = {name: REWARDS[name](trees, ctx) for name in weights}
    for name, part in parts.items():
        _check_finite(name, part, trees)
    total = np.zeros(len(trees.leaf), np.float32)
    for name, weight in weights.items():
        total += np.float32(weight) * parts[name]
    return ScoredTrees(trees=trees, reward=total, parts=parts)


def score_all(trees: SearchTrees, ctx: RewardContext, weights: Mapping[str, float]) -> ScoredTrees:
    """Score candidates as `score_trees` does, then their steps and, with a value head, the nodes.

    Malformed candidates have reward 0; their `parts` are unchanged.
    """
    scored = score_trees(trees, ctx, weights)
    if ctx.settings.steps == "utility":
        scored = with_step_rewards(scored, ctx.catalog, step_utilities(trees, ctx))
    else:
        scored = add_step_rewards(scored, ctx.catalog, prefix=ctx.match_prefix)
    if ctx.value is None:
        return scored
    return add_value_rewards(scored, ctx.catalog, ctx.value, embedding=ctx.embedding)


def _check_finite(name: str, part: Float32[np.ndarray, " C"], trees: SearchTrees) -> None:
    """Raise DataError if a reward is not finite."""
    bad = np.flatnonzero(~np.isfinite(part))
    if len(bad):
        prompt = trees.prompts.id[trees.prompt_of_candidate[bad[0]]]
        raise DataError(
            f"reward {name} is {part[bad[0]]} for leaf {trees.leaf[bad[0]]} of prompt {prompt} "
            f"({len(bad)} of {len(part)} candidates); rewards must be finite, repair this one"
        )
