"""Settings of the prefix critic that can guide a search instead of the policy's value head."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from orchard.settings.rewards import ScorerConfig
from orchard.settings.section import Fraction


class CriticConfig(ScorerConfig):
    """Prefix value model, trained offline with MARWIL by `orchard fit critic`.

    Step rewards and their discount are those of `learner.value`.
    """

    backend: str = "torch"
    """Trainer of the critic: the training loop of this repository, or RLlib's MARWIL learner, which
    needs requirements/rllib.txt. Both train the same network on the same trie walks with the same
    loss."""
    rows: Literal["train", "all"] = "train"
    """Rows that the critic is fitted to: those of the warm start alone, or the fresh rows of
    `data.fresh` or `data.hold_back` as well."""
    beta: Annotated[float, Field(gt=0.0)] = 1.0
    """MARWIL beta: factor of the advantage in the exponent of an imitated step's weight."""
    value_weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Weight of the value loss (squared error) relative to the imitation loss."""
    contrasts: PositiveInt = 4
    """Contrastive trie walks per row, in addition to the logged one: each follows the logged walk
    for some codes, then takes random children."""
    dropout: Fraction = 0.1
    """Dropout rate of the critic during training."""
    batch_size: PositiveInt = 128
    """Rows per update."""
    lr: NonNegativeFloat = 2e-3
    """Learning rate of the critic."""
