"""How often items followed others in the rows of training.

Shapes:  B prompts   B1 = B + 1   H items of all histories   K leaves   P pairs   Q pairs asked for
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from orchard import ragged


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionCounts:
    """How often, by weight, a leaf was the target behind a leaf in the history of a row."""

    num_leaves: int
    decay: float
    """Weight of a history item beside that of the one after it; the last weighs 1."""
    pair: Int64[np.ndarray, " P"]
    """`before * num_leaves + after`, ascending."""
    weight: Float64[np.ndarray, " P"]
    total: Float64[np.ndarray, " K"]
    """Of all pairs that begin with a leaf."""

    def of(self, pair: Int64[np.ndarray, " Q"]) -> Float64[np.ndarray, " Q"]:
        """The weight of any pairs; 0 for those that were never seen."""
        if not len(self.pair):
            return np.zeros(len(pair))
        place = np.minimum(np.searchsorted(self.pair, pair), len(self.pair) - 1)
        return np.where(self.pair[place] == pair, self.weight[place], 0.0)


def count_transitions(
    history: Int64[np.ndarray, " H"],
    history_start: Int64[np.ndarray, " B1"],
    target: Int64[np.ndarray, " B"],
    *,
    num_leaves: int,
    decay: float,
) -> TransitionCounts:
    """Count rows whose histories and targets are given as leaves."""
    own = target[ragged.owners(history_start)]
    pair, place = np.unique(history * num_leaves + own, return_inverse=True)
    weight = recency(history_start, decay)
    return TransitionCounts(
        num_leaves=num_leaves,
        decay=decay,
        pair=pair,
        weight=np.bincount(place, weights=weight, minlength=len(pair)),
        total=np.bincount(history, weights=weight, minlength=num_leaves),
    )


def recency(start: Int64[np.ndarray, " B1"], decay: float) -> Float64[np.ndarray, " H"]:
    """1 for the last item of each history, and `decay` times as much for each item before it."""
    age = np.repeat(start[1:], np.diff(start)) - 1 - np.arange(int(start[-1]))
    return decay**age
