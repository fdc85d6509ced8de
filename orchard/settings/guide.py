"""Settings of the guide, whose experts value prefixes in a search."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from orchard.settings.section import Section


class GuideConfig(Section):
    """Experts counted in the training rows, and the fit of their weights by `orchard fit guide`."""

    experts: tuple[str, ...] = ("transitions", "cooccurrence", "item_knn", "neighbors")
    """Experts of the guide: `transitions` from the history to the target, forward `cooccurrence`
    within ten items, `item_knn` by the cosine of their users, `neighbors` within three items in
    both directions, or registered experts of your own."""
    counts: Literal["train", "all", "feedback"] = "train"
    """Rows that are counted: only those of the warm start; also the fresh rows of `data.fresh` or
    `data.hold_back`; or all of these and the rewarded items of `data.feedback`, weighted by their
    reward."""
    half_life: NonNegativeFloat = 0.0
    """Age in days, relative to the newest request, at which a shown item counts half; 0 for no
    decay."""
    pairs: NonNegativeInt = 500
    """Maximum number of pairs that an expert keeps of each semantic ID, the strongest; 0 keeps
    all."""
    rows: PositiveInt = 5000
    """Maximum number of validation rows that the weights are fitted to."""
    beams: PositiveInt = 50
    """Width of the beams whose candidates the weights are fitted to."""
    ridge: Annotated[float, Field(gt=0.0)] = 1e-3
    """Weight of the squared weights in the loss of the fit."""
