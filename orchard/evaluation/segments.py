"""Divide held-out rows into segments, and compute the metrics of each.

The segments are fifths of the rows by the popularity of their target in training, with targets that
training never saw apart; lengths of the history; and users with and without training rows.

Shapes:  B evaluated rows   R items of all training rows   R2 training rows
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int64

from orchard.evaluation.bootstrap import Estimate, estimates
from orchard.evaluation.ranking import TargetRanks

_FIFTHS = 5
_LENGTHS = ((0, 2), (3, 5), (6, 10), (11, None))
"""First and last length of each segment of histories."""
K = 10
"""Number of first places of a list that the metrics of segments are about."""


def segments_of(
    *,
    target: Int64[np.ndarray, " B"],
    history_length: Int64[np.ndarray, " B"],
    user: Int64[np.ndarray, " B"],
    train_item: Int64[np.ndarray, " R"],
    train_user: Int64[np.ndarray, " R2"],
) -> dict[str, Bool[np.ndarray, " B"]]:
    """Return which rows are in each segment, by its name; segments without rows are left out.

    With a single target, the recall of a list is its hit rate.

    Args:
        target: item to find in each row.
        history_length: number of items of each row's history.
        user: user of each row.
        train_item: every item of every training row, in histories and as targets.
        train_user: user of every training row.
    """
    popularity = np.bincount(train_item, minlength=int(target.max(initial=0)) + 1)[target]
    seen = popularity > 0
    segments = {"target never seen in training": ~seen}
    # Equal popularities stay together: the edges are popularities, not rows.
    edges = np.quantile(popularity[seen], np.arange(1, _FIFTHS) / _FIFTHS) if seen.any() else []
    fifth = np.searchsorted(edges, popularity, side="left")
    for index in range(_FIFTHS):
        extreme = {0: " (least popular)", _FIFTHS - 1: " (most popular)"}.get(index, "")
        segments[f"target in fifth {index + 1}{extreme}"] = seen & (fifth == index)
    for low, high in _LENGTHS:
        name = f"history of {low} to {high} items" if high else f"history of {low} items or more"
        longest = high or history_length.max(initial=0)
        segments[name] = (history_length >= low) & (history_length <= longest)
    known = np.isin(user, train_user)
    segments |= {"user with training rows": known, "user without training rows": ~known}
    return {name: mask for name, mask in segments.items() if mask.any()}


def by_segment(
    ranks: TargetRanks,
    segments: Mapping[str, Bool[np.ndarray, " B"]],
    *,
    width: int,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Estimate HR and NDCG of the first `K` places and the mean reciprocal rank, per segment.

    The reciprocal rank of a target outside the list of `width` candidates is 0.
    """
    columns: dict[str, np.ndarray] = {}
    for level, rank in (("sid", ranks.sid), ("item", ranks.item)):
        first = min(K, width)
        columns[f"hr@{first}/{level}"] = np.where(rank < first, 1.0, 0.0)
        columns[f"ndcg@{first}/{level}"] = np.where(rank < first, 1 / np.log2(rank + 2.0), 0.0)
        columns[f"mrr@{width}/{level}"] = np.where(rank < width, 1 / (rank + 1.0), 0.0)
    values = np.stack(list(columns.values()), axis=1)
    return {
        name: estimates(list(columns), values[mask], resamples=resamples, seed=seed)
        for name, mask in segments.items()
    }
