"""The settings of the rewards, and of the models that some of them ask."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from orchard.settings.section import Duration, NonNegative, Positive, Rate, Section, Share


def _check_heads(reward: str, hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise ValueError(
            f"rewards.{reward}.hidden_size = {hidden_size} is not a multiple of "
            f"rewards.{reward}.heads = {heads}; choose one that is"
        )


class CollaborativeConfig(Section):
    """The SASRec model behind the reward `collaborative`; `orchard fit collaborative` makes it."""

    path: Path | None = None
    """Its folder; by default `collaborative` in the run's own."""
    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 2
    dropout: Share = 0.3
    epochs: Positive = 30
    minutes: Rate = 0.0
    """Stop after the epoch in which so many minutes have passed; 0 sets no limit."""
    patience: Positive = 4
    """Stop after so many epochs without a better NDCG@10 on the validation rows."""
    batch_size: Positive = 64
    """User sequences per update."""
    lr: Rate = 3e-3
    weight_decay: Rate = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "CollaborativeConfig":
        _check_heads("collaborative", self.hidden_size, self.heads)
        return self


class RewardsConfig(Section):
    """Search trees to scored trees."""

    weights: dict[str, float] = Field(default_factory=lambda: {"rule": 1.0, "ranking": 1.0})
    """Weight of each part, by name; the names are those of `rewards.REWARDS`."""
    ranking: Literal["coded", "published"] = "coded"
    """Form of the part `ranking`: as the authors run it, or as printed, which also punishes groups
    without the target (see `docs/rewards.md`)."""
    collaborative: CollaborativeConfig = CollaborativeConfig()
    actors: Positive = 1
    queue: Positive = 8
    """Batches that may wait at each actor."""
    timeout_s: Duration = 30.0
    retries: NonNegative = 2
    max_restarts: NonNegative = 3
