"""The prefix critic that may guide a search in the place of the policy's own value head."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from orchard.settings.rewards import ScorerConfig
from orchard.settings.section import Fraction


class CriticConfig(ScorerConfig):
    """What prefixes promise, learned offline by MARWIL; `orchard fit critic` makes it.

    Step rewards and their discount are those of `learner.value`.
    """

    backend: Literal["torch", "rllib"] = "torch"
    """Who updates it: a loop of this repository's own, or RLlib's MARWIL learner, which needs
    requirements/rllib.txt; both train the same network on the same walks by the same loss."""
    beta: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the advantage in the weight of an imitated step."""
    value_weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the values' squared error beside the imitation."""
    contrasts: PositiveInt = 4
    """Walks down the trie beside the logged one of each row: they follow it for some codes, then
    take any child."""
    dropout: Fraction = 0.1
    batch_size: PositiveInt = 128
    """Rows per update."""
    lr: NonNegativeFloat = 2e-3
