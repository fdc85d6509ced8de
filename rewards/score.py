"""The weighted sum of rewards, with its parts kept for the log.

Shapes:  C candidates
"""

import difflib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, ConfigError, DataError
from orchard.types import ScoredTrees, SearchTrees
from rewards.registry import REQUIREMENTS, REWARDS, RewardContext


def check_rewards(weights: Mapping[str, float]) -> None:
    """Refuse weights of rewards that do not exist; raises ConfigError with the nearest name."""
    for name in weights:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(REWARDS)}"
            raise ConfigError(f"rewards.weights names an unknown reward {name}; {hint}")


def preload(weights: Mapping[str, float], known: RewardContext) -> None:
    """Load what the rewards need, so that what is missing is found before anything is scored.

    Raises:
        ConfigError, DataError, CatalogError: one sentence on what is missing or does not fit.
    """
    check_rewards(weights)
    for name in weights:
        if name in REQUIREMENTS:
            REQUIREMENTS[name](known)


def score_trees(
    trees: SearchTrees, known: RewardContext | Catalog, weights: Mapping[str, float]
) -> ScoredTrees:
    """Judge every candidate; a part of weight 0 is computed for the log alone.

    A bare catalog will do for rewards that look up nothing else.

    Raises:
        ConfigError: a weight of an unknown reward.
        CatalogError: the trees were grown on another catalog, so that leaves mean other items.
        DataError: a reward is not finite.
    """
    check_rewards(weights)
    if isinstance(known, Catalog):
        known = RewardContext(catalog=known)
    if trees.catalog != known.catalog.digest:
        raise CatalogError(
            f"the trees were grown on catalog {trees.catalog[:12]}, the rewards hold "
            f"{known.catalog.digest[:12]}; start both from the same items file"
        )
    parts = {name: REWARDS[name](trees, known) for name in weights}
    for name, part in parts.items():
        _refuse_non_finite(name, part, trees)
    total = np.zeros(len(trees.leaf), np.float32)
    for name, weight in weights.items():
        total += np.float32(weight) * parts[name]
    return ScoredTrees(trees=trees, reward=total, parts=parts)


def _refuse_non_finite(name: str, part: Float32[np.ndarray, " C"], trees: SearchTrees) -> None:
    bad = np.flatnonzero(~np.isfinite(part))
    if len(bad):
        prompt = trees.prompts.id[trees.prompt_of_candidate[bad[0]]]
        raise DataError(
            f"reward {name} is {part[bad[0]]} for leaf {trees.leaf[bad[0]]} of prompt {prompt} "
            f"({len(bad)} of {len(part)} candidates); rewards must be finite, repair this one"
        )
