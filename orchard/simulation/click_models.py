"""Click models: which items of a list are clicked, given how attractive each is if it is looked at.

    position     rank k is looked at with probability k^-eta, whatever was clicked above it
                 (position-based model: Richardson et al. 2007; Craswell et al. 2008)
    cascade      ranks are looked at from the top; after a skipped item the user goes on with
                 probability `after_skip`, after a click with `after_click`
                 (Craswell et al. 2008; dependent click model: Guo et al. 2009)
    satiation    as `position`, but every click on an item of a group multiplies the attraction of
                 the group's later items by `fade`, so that the value of a list is no sum over items

Each model gives click probabilities in closed form, and clicks as a function of uniform numbers.

Shapes:  R lists   K ranks
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64

from orchard.errors import ConfigError


@runtime_checkable
class ClickModel(Protocol):
    """Distribution of the clicks on a list."""

    def probability(
        self, attraction: Float64[np.ndarray, "R K"], group: Int64[np.ndarray, "R K"]
    ) -> Float64[np.ndarray, "R K"]:
        """Return the probability that each rank is clicked.

        Args:
            attraction: probability of a click on each item if it is looked at; 0 past the end.
            group: group of each item; any integers.
        """
        ...

    def clicks(
        self,
        attraction: Float64[np.ndarray, "R K"],
        group: Int64[np.ndarray, "R K"],
        look: Float64[np.ndarray, "R K"],
        like: Float64[np.ndarray, "R K"],
    ) -> Bool[np.ndarray, "R K"]:
        """Return the clicks that uniform numbers in [0, 1) give.

        Args:
            attraction: as for `probability`.
            group: as for `probability`.
            look: decides whether each rank is looked at.
            like: decides whether an item that is looked at is clicked.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PositionBased:
    """Model `position`."""

    eta: float = 1.0

    def looked_at(self, num_ranks: int) -> Float64[np.ndarray, " K"]:
        """Return the probability that each rank is looked at."""
        return (1.0 + np.arange(num_ranks)) ** -self.eta

    def probability(
        self, attraction: Float64[np.ndarray, "R K"], group: Int64[np.ndarray, "R K"]
    ) -> Float64[np.ndarray, "R K"]:
        """Return the probability that each rank is clicked; see `ClickModel`."""
        return attraction * self.looked_at(attraction.shape[1])

    def clicks(
        self,
        attraction: Float64[np.ndarray, "R K"],
        group: Int64[np.ndarray, "R K"],
        look: Float64[np.ndarray, "R K"],
        like: Float64[np.ndarray, "R K"],
    ) -> Bool[np.ndarray, "R K"]:
        """Return the clicks; see `ClickModel`."""
        return (look < self.looked_at(attraction.shape[1])) & (like < attraction)


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Model `cascade`."""

    after_click: float = 0.0
    after_skip: float = 1.0

    def probability(
        self, attraction: Float64[np.ndarray, "R K"], group: Int64[np.ndarray, "R K"]
    ) -> Float64[np.ndarray, "R K"]:
        """Return the probability that each rank is clicked; see `ClickModel`."""
        clicked = np.zeros_like(attraction)
        looked_at = np.ones(len(attraction))
        for rank in range(attraction.shape[1]):
            clicked[:, rank] = looked_at * attraction[:, rank]
            skipped = looked_at - clicked[:, rank]
            looked_at = self.after_click * clicked[:, rank] + self.after_skip * skipped
        return clicked

    def clicks(
        self,
        attraction: Float64[np.ndarray, "R K"],
        group: Int64[np.ndarray, "R K"],
        look: Float64[np.ndarray, "R K"],
        like: Float64[np.ndarray, "R K"],
    ) -> Bool[np.ndarray, "R K"]:
        """Return the clicks; see `ClickModel`."""
        clicked = np.zeros(attraction.shape, dtype=np.bool_)
        looking = np.ones(len(attraction), dtype=np.bool_)
        for rank in range(attraction.shape[1]):
            clicked[:, rank] = looking & (like[:, rank] < attraction[:, rank])
            goes_on = np.where(clicked[:, rank], self.after_click, self.after_skip)
            looking &= look[:, rank] < goes_on
        return clicked


@dataclass(frozen=True, kw_only=True)
class Satiation:
    """Model `satiation`."""

    eta: float = 1.0
    fade: float = 0.5

    def probability(
        self, attraction: Float64[np.ndarray, "R K"], group: Int64[np.ndarray, "R K"]
    ) -> Float64[np.ndarray, "R K"]:
        """Return the probability that each rank is clicked; see `ClickModel`.

        The number of clicks in a group is a Markov chain along the list, which is followed exactly.
        """
        num_lists, num_ranks = attraction.shape
        clicked = np.zeros_like(attraction)
        every = np.arange(num_lists)
        # First rank of each item's group, which stands for the group: [R, K].
        first = (group[:, :, None] == group[:, None, :]).argmax(axis=2)
        # Probability of n clicks so far in each group: [R, K, K + 1].
        count = np.zeros((num_lists, num_ranks, num_ranks + 1))
        count[:, :, 0] = 1.0
        fading = self.fade ** np.arange(num_ranks + 1)
        looked_at = PositionBased(eta=self.eta).looked_at(num_ranks)
        for rank in range(num_ranks):
            before = count[every, first[:, rank]]
            moved = before * (looked_at[rank] * attraction[:, rank])[:, None] * fading
            clicked[:, rank] = moved.sum(axis=1)
            after = before - moved
            after[:, 1:] += moved[:, :-1]
            count[every, first[:, rank]] = after
        return clicked

    def clicks(
        self,
        attraction: Float64[np.ndarray, "R K"],
        group: Int64[np.ndarray, "R K"],
        look: Float64[np.ndarray, "R K"],
        like: Float64[np.ndarray, "R K"],
    ) -> Bool[np.ndarray, "R K"]:
        """Return the clicks; see `ClickModel`."""
        clicked = np.zeros(attraction.shape, dtype=np.bool_)
        looked_at = PositionBased(eta=self.eta).looked_at(attraction.shape[1])
        for rank in range(attraction.shape[1]):
            earlier = clicked[:, :rank] & (group[:, :rank] == group[:, rank : rank + 1])
            faded = attraction[:, rank] * self.fade ** earlier.sum(axis=1)
            clicked[:, rank] = (look[:, rank] < looked_at[rank]) & (like[:, rank] < faded)
        return clicked


CLICK_MODELS: Mapping[str, type[PositionBased] | type[Cascade] | type[Satiation]] = {
    "position": PositionBased, "cascade": Cascade, "satiation": Satiation,
}  # fmt: skip


def click_model(name: str, **constants: float) -> ClickModel:
    """Return a click model by name, with some of its constants.

    Raises:
        ConfigError: there is no such model or constant, or a constant is out of bounds.
    """
    if name not in CLICK_MODELS:
        raise ConfigError(
            f"there is no click model {name!r}; choose from {', '.join(sorted(CLICK_MODELS))}",
            code="config.unknown_name",
        )
    known = CLICK_MODELS[name].__dataclass_fields__
    for constant, value in constants.items():
        if constant not in known:
            raise ConfigError(
                f"click model {name!r} has no constant {constant!r}; it has {', '.join(known)}"
            )
        if not 0 <= value <= (10 if constant == "eta" else 1):
            raise ConfigError(
                f"constant {constant} = {value} of click model {name!r} is out of bounds; use "
                f"{'0 to 10' if constant == 'eta' else 'a probability'}"
            )
    return CLICK_MODELS[name](**constants)
