"""Registry of the experts of a guide, by their name in `guide.experts`.

To add an expert, write a function from the training rows to an `Expert` and register it with the
scales at which its scores are read. An expert that is not counted (the top items of a two-tower
model, for instance) is a matrix just as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchard.guide import count
from orchard.guide.expert import Expert, LeafRows
from orchard.registry import Facts, Registry

ExpertFactory = Callable[[LeafRows], Expert]
"""Factory of an expert from the training rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts(Facts):
    """Properties of an expert that the fit looks up."""

    scales: tuple[float, ...] = (0.01,)
    """Scales eps of its scores: each adds the feature log(1 + e / eps) to the reward."""


EXPERTS: Registry[ExpertFactory, ExpertFacts] = Registry(
    "expert", ("guide.experts",), ExpertFacts()
)
"""Experts by their name in `guide.experts`."""

EXPERTS.register("transitions", ExpertFacts(scales=(0.001, 0.01)))(count.transitions)
EXPERTS.register("cooccurrence", ExpertFacts(scales=(0.001, 0.01)))(count.cooccurrence)
EXPERTS.register("item_knn", ExpertFacts(scales=(0.01, 0.1)))(count.item_knn)
EXPERTS.register("neighbors", ExpertFacts(scales=(0.001, 0.01)))(count.neighbors)
