"""Count item-to-item transitions, from history to target, in the training rows.

Shapes:  B prompts   B1 = B + 1   H items of all histories   K leaves   P pairs   Q queried pairs
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from orchard import ragged


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionCounts:
    """Weighted counts of (history leaf, target leaf) pairs over the training rows."""

    num_leaves: int
    decay: float
    """Weight of a history item relative to the next one; the last item has weight 1."""
    pair: Int64[np.ndarray, " P"]
    """Pair keys `before * num_leaves + after`, ascending."""
    weight: Float64[np.ndarray, " P"]
    """Summed weight of each pair."""
    total: Float64[np.ndarray, " K"]
    """Summed weight of all pairs with each leaf as `before`."""

    def of(self, pair: Int64[np.ndarray, " Q"]) -> Float64[np.ndarray, " Q"]:
        """Return the weights of pairs, 0 for pairs never seen."""
        if not len(self.pair):
            return np.zeros(len(pair))
        index = np.minimum(np.searchsorted(self.pair, pair), len(self.pair) - 1)
        return np.where(self.pair[index] == pair, self.weight[index], 0.0)


def count_transitions(
    history: Int64[np.ndarray, " H"],
    history_start: Int64[np.ndarray, " B1"],
    target: Int64[np.ndarray, " B"],
    *,
    num_leaves: int,
    decay: float,
) -> TransitionCounts:
    """Count the transitions of rows whose histories and targets are leaves."""
    after = target[ragged.row_of(history_start)]  # target of each history item's row
    pair, pair_index = np.unique(history * num_leaves + after, return_inverse=True)
    weight = recency(history_start, decay)
    return TransitionCounts(
        num_leaves=num_leaves,
        decay=decay,
        pair=pair,
        weight=np.bincount(pair_index, weights=weight, minlength=len(pair)),
        total=np.bincount(history, weights=weight, minlength=num_leaves),
    )


def recency(start: Int64[np.ndarray, " B1"], decay: float) -> Float64[np.ndarray, " H"]:
    """Return the weight of each history item: 1 for the last, times `decay` per step back."""
    age = np.repeat(start[1:], np.diff(start)) - 1 - np.arange(int(start[-1]))
    return decay**age
