"""The settings of the rewards, and of the models that some of them ask."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from orchard.settings.section import Fraction, Section


class ScorerConfig(Section):
    """Sizes of a model that a reward or a search asks, and how it is fitted."""

    path: Path | None = None
    """Its folder; by default that of its name in the run's own."""
    hidden_size: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    dropout: Fraction = 0.3
    epochs: PositiveInt = 30
    minutes: NonNegativeFloat = 0.0
    """Stop after the epoch in which so many minutes have passed; 0 sets no limit."""
    patience: PositiveInt = 4
    """Stop after so many epochs without a better figure on the validation rows."""
    batch_size: PositiveInt = 64
    """User sequences, or lists, per update."""
    lr: NonNegativeFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "ScorerConfig":
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of heads = {self.heads}; "
                "choose one that is"
            )
        return self


class CollaborativeConfig(ScorerConfig):
    """The SASRec model behind the reward `collaborative`; `orchard fit collaborative` makes it."""


class ListwiseConfig(ScorerConfig):
    """The list evaluator behind the reward `listwise`; `orchard fit listwise` makes it."""

    list_size: Annotated[int, Field(ge=2)] = 16
    """Candidates of a training list: the target and others; best near `rollout.group_size`."""
    near: Fraction = 0.5
    """Share of the others that are neighbours of the target in the trie; the rest are drawn as
    often as they are targets."""
    batch_size: PositiveInt = 256
    """Lists per update."""
    lr: NonNegativeFloat = 1e-3


class TransitionConfig(Section):
    """What the reward `transition` counts in the training rows."""

    decay: Fraction = 0.3
    """Weight of a history item beside that of the one after it."""
    floor: Annotated[float, Field(gt=0.0)] = 1e-3
    """Added to a candidate's strength before the logarithm: that of one that never followed."""


class RewardsConfig(Section):
    """Search trees to scored trees."""

    section: ClassVar[str] = "rewards"
    renamed: ClassVar[Mapping[str, str]] = {"ranking": "ranking_variant"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "ranking_variant": {"coded": "reference_code", "published": "paper"}
    }

    weights: dict[str, float] = Field(default_factory=lambda: {"rule": 1.0, "ranking": 1.0})
    """Weight of each part, by name; the names are those of `rewards.REWARDS`."""
    ranking_variant: Literal["reference_code", "paper"] = "reference_code"
    """Form of the part `ranking`: as the authors run it, or as printed, which also punishes groups
    without the target (see `docs/rewards.md`)."""
    collaborative: CollaborativeConfig = CollaborativeConfig()
    transition: TransitionConfig = TransitionConfig()
    listwise: ListwiseConfig = ListwiseConfig()
    actors: PositiveInt = 1
    queue: PositiveInt = 8
    """Batches that may wait at each actor."""
    timeout_s: PositiveFloat = 30.0
    retries: NonNegativeInt = 2
    max_restarts: NonNegativeInt = 3
