"""Registry of the reward functions, by their name in `rewards.weights`.

To add a reward, write a function of the type `Reward` in a module of its own and register it in
`REWARDS`; its name is then a key of `rewards.weights` in a run file. If the reward needs more than
the trees and the catalog, name the loader of it in `RewardFacts`, so that a missing input stops the
run before it starts. `docs/extending.md` has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from orchard.errors import ConfigError
from orchard.registry import Facts, Registry
from orchard.settings import Config
from orchard.types import SearchTrees
from rewards.collaborative import collaborative
from rewards.context import RewardContext
from rewards.expert import expert
from rewards.listwise import listwise
from rewards.rule import prefix, ranking, rule
from rewards.similarity import diversity, popularity_debias, semantic
from rewards.transition import transition
from rewards.utility import utility

Reward = Callable[[SearchTrees, RewardContext], Float32[np.ndarray, " C"]]
"""Function from the trees of a batch to one finite number per candidate, larger for better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFacts(Facts):
    """Properties of a reward that a run looks up."""

    load: Callable[[RewardContext], object] | None = None
    """Loader of the input that the reward needs besides trees and catalog; raises an OrchardError
    if it is missing."""
    needs_hit: bool = False
    """Whether candidates differ only in a group with the target."""


def _outcome_is_weighted(config: Config) -> None:
    """Refuse parts of the value targets that are not scored."""
    unweighted = config.learner.value.outcome.keys() - config.rewards.weights.keys()
    if unweighted:
        raise ConfigError(
            f"learner.value.outcome names {', '.join(sorted(unweighted))}, which "
            "rewards.weights does not; give it a weight there, 0 to have it scored alone",
            code="config.outcome_without_weight",
        )


REWARDS: Registry[Reward, RewardFacts] = Registry(
    "reward", ("rewards.weights",), RewardFacts(), rules=(_outcome_is_weighted,)
)
"""Rewards by their name in `rewards.weights`."""

REWARDS.register("rule", RewardFacts(needs_hit=True))(rule)
REWARDS.register("ranking", RewardFacts(needs_hit=True))(ranking)
REWARDS.register("prefix")(prefix)
REWARDS.register("semantic", RewardFacts(load=lambda ctx: ctx.leaf_embedding))(semantic)
REWARDS.register("collaborative", RewardFacts(load=lambda ctx: ctx.sasrec))(collaborative)
REWARDS.register("transition", RewardFacts(load=lambda ctx: ctx.counted_transitions))(transition)
REWARDS.register("utility", RewardFacts(load=lambda ctx: ctx.prefix_utilities))(utility)
REWARDS.register("expert", RewardFacts(load=lambda ctx: ctx.expert_counts))(expert)
REWARDS.register("listwise", RewardFacts(load=lambda ctx: ctx.listwise_ranker))(listwise)
REWARDS.register("diversity")(diversity)
REWARDS.register("popularity_debias", RewardFacts(load=lambda ctx: ctx.leaf_popularity))(
    popularity_debias
)

__all__ = ["REWARDS", "Reward", "RewardContext", "RewardFacts"]
