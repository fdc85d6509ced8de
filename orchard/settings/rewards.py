"""Settings of the rewards and of the scorer models behind some of them."""

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

from orchard.settings.section import Fraction, Section, refusal


class ScorerConfig(Section):
    """Size and training of a scorer model that a reward or a search uses."""

    path: Path | None = None
    """Folder of the saved model; by default the folder of the model's name in the run folder."""
    hidden_size: PositiveInt = 64
    """Hidden width of the model."""
    layers: PositiveInt = 2
    """Number of attention layers."""
    heads: PositiveInt = 2
    """Number of attention heads; must divide `hidden_size`."""
    dropout: Fraction = 0.3
    """Dropout rate during training."""
    epochs: PositiveInt = 30
    """Maximum number of epochs."""
    minutes: NonNegativeFloat = 0.0
    """Time limit in minutes, checked after each epoch; 0 sets no limit."""
    patience: PositiveInt = 4
    """Number of epochs without a better validation metric before training stops."""
    batch_size: PositiveInt = 64
    """Number of user sequences, or of lists, per update."""
    lr: NonNegativeFloat = 3e-3
    """Learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ScorerConfig":
        if self.hidden_size % self.heads:
            raise refusal(
                "not_a_multiple",
                f"hidden_size = {self.hidden_size} is not a multiple of heads = {self.heads}; "
                "choose one that is",
            )
        return self


class CollaborativeConfig(ScorerConfig):
    """SASRec model of the reward `collaborative`, trained by `orchard fit collaborative`."""


class ListwiseConfig(ScorerConfig):
    """List evaluator of the reward `listwise`, trained by `orchard fit listwise`."""

    list_size: Annotated[int, Field(ge=2)] = 16
    """Number of candidates in a training list, the target included; best close to
    `rollout.group_size`."""
    near: Fraction = 0.5
    """Share of the other candidates that are neighbors of the target in the trie; the rest are
    drawn in proportion to their frequency as targets."""
    batch_size: PositiveInt = 256
    """Number of lists per update."""
    lr: NonNegativeFloat = 1e-3
    """Learning rate."""


class TransitionConfig(Section):
    """Item-to-item transition counts of the training rows, for the reward `transition`."""

    decay: Fraction = 0.3
    """Weight of a history item relative to the next more recent item."""
    floor: Annotated[float, Field(gt=0.0)] = 1e-3
    """Constant added to a candidate's transition strength before the logarithm, and thus the
    strength of a candidate without observed transitions."""


class UtilityConfig(Section):
    """Utilities of prefixes (HRPO, arXiv 2608.00750), as reward `utility` or `rewards.steps`."""

    clusters: tuple[Literal["last_item", "last_code", "history"], ...] = ("last_code", "last_item")
    """Clusters of histories within which utilities are estimated, from coarse to fine: by the
    first code of the last item, by the last item, or by k-means of the embeddings of the history
    (`data.embeddings`). Each backs off to the one before it, and the first to all histories."""
    groups: PositiveInt = 64
    """Number of k-means clusters of `history`."""
    prior: PositiveFloat = 1.0
    """Number of shown items that the backoff estimate counts as."""
    backoff: Literal["residual", "paper"] = "residual"
    """Value that a prefix of a cluster backs off to: that of the shorter prefix in the cluster,
    plus the contribution of its last code in the coarser cluster; or, as in the paper, that of the
    shorter prefix alone, and of the coarser cluster if the cluster has no data."""
    floor: NonNegativeFloat = 0.0
    """Constant that is added to utilities of next items before their logarithm is taken, as in
    `rewards.transition.floor`; with 0, no logarithm is taken."""
    source: Literal["auto", "feedback", "train"] = "auto"
    """Rows that utilities are estimated from: those of `data.feedback`, or the known training rows,
    whose targets have reward 1 and all other items 0; `auto` takes feedback where there is any."""


class RewardsConfig(Section):
    """Reward functions that score the candidates of search trees."""

    section: ClassVar[str] = "rewards"
    renamed: ClassVar[Mapping[str, str]] = {"ranking": "ranking_variant"}
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "ranking_variant": {"coded": "reference_code", "published": "paper"}
    }

    weights: dict[str, float] = Field(default_factory=lambda: {"rule": 1.0, "ranking": 1.0})
    """Weight of each reward part, by its name in the registry of rewards."""
    ranking_variant: Literal["reference_code", "paper"] = "reference_code"
    """Variant of the part `ranking`: that of the authors' code, or that of the paper, which also
    penalizes groups without the target (see `docs/rewards.md`)."""
    collaborative: CollaborativeConfig = CollaborativeConfig()
    transition: TransitionConfig = TransitionConfig()
    utility: UtilityConfig = UtilityConfig()
    steps: Literal["match", "utility"] = "match"
    """Reward of each code, for estimators of step-level credit: 1 if it matches the target, or its
    contribution to the utility of the prefix (see `rewards.utility`)."""
    listwise: ListwiseConfig = ListwiseConfig()
    actors: PositiveInt = 1
    """Number of reward actors."""
    queue: PositiveInt = 8
    """Maximum number of batches queued at each actor."""
    timeout_s: PositiveFloat = 30.0
    """Seconds to wait for the scores of one batch."""
    retries: NonNegativeInt = 2
    """Number of times a batch is sent again after an actor died or missed its deadline."""
    max_restarts: NonNegativeInt = 3
    """Number of actors that may be replaced over the whole run."""

    @model_validator(mode="after")
    def _some_part_weighs(self) -> "RewardsConfig":
        if not any(self.weights.values()):
            raise refusal(
                "no_reward",
                "rewards.weights has no part with a weight; give one, e.g. rule = 1.0",
            )
        return self
