"""Registry of the experts of a guide, by their name in `guide.experts`.

To add an expert, write a function from the training rows to an `Expert` and register it with the
scales at which its scores are read. An expert that is not counted (the top items of a two-tower
model, for instance) is a matrix just as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchard.guide import count, left_out
from orchard.guide.expert import Expert, LeafRows
from orchard.registry import Facts, Registry

ExpertFactory = Callable[[LeafRows], Expert]
"""Factory of an expert from the training rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts(Facts):
    """Properties of an expert that the fit looks up."""

    scales: tuple[float, ...] = (0.01,)
    """Scales eps of its scores: each adds the feature log(1 + e / eps) to the reward."""
    counts: left_out.CountFactory | None = None
    """Factory of the counts behind it, which the reward `expert` needs to leave out a row."""
    pairs: count.PairScheme | None = None
    """Pairs that it counts as conditional frequencies, to which events add; None for others."""


EXPERTS: Registry[ExpertFactory, ExpertFacts] = Registry(
    "expert", ("guide.experts",), ExpertFacts()
)
"""Experts by their name in `guide.experts`."""

_FINE = (0.001, 0.01)
"""Scales of conditional frequencies."""

for _name, _factory, _counts, _pairs, _scales in (
    (
        "transitions",
        count.transitions,
        left_out.count_transitions,
        count.TRANSITIONS,
        (0.001, 0.01),
    ),
    (
        "cooccurrence",
        count.cooccurrence,
        left_out.count_cooccurrence,
        count.COOCCURRENCE,
        (0.001, 0.01),
    ),
    ("item_knn", count.item_knn, left_out.UserCounts, None, (0.01, 0.1)),
    ("neighbors", count.neighbors, left_out.count_neighbors, count.NEIGHBORS, (0.001, 0.01)),
):
    EXPERTS.register(_name, ExpertFacts(scales=_scales, counts=_counts, pairs=_pairs))(_factory)
