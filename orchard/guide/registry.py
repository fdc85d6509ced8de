"""Registry of the experts of a guide, by their name in `guide.experts`.

To add an expert, write a function from the training rows to an `Expert` in a module of this package
and register it in `EXPERTS` with the scales at which its scores are read. An expert that is not
counted (the top items of a two-tower model, for instance) is a matrix just as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

from orchard.guide.count import cooccurrence, item_knn, neighbors, transitions
from orchard.guide.expert import Expert, LeafRows


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEntry:
    """Registered expert."""

    count: Callable[[LeafRows], Expert]
    """Function from the training rows to the expert."""
    scales: tuple[float, ...] = (0.01,)
    """Scales eps of its scores: each adds the feature log(1 + e / eps) to the reward."""


EXPERTS: dict[str, ExpertEntry] = {
    "transitions": ExpertEntry(count=transitions, scales=(0.001, 0.01)),
    "cooccurrence": ExpertEntry(count=cooccurrence, scales=(0.001, 0.01)),
    "item_knn": ExpertEntry(count=item_knn, scales=(0.01, 0.1)),
    "neighbors": ExpertEntry(count=neighbors, scales=(0.001, 0.01)),
}
