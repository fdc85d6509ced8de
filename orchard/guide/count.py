"""Count the matrices of the built-in experts in the training rows.

Shapes:  B rows   H history leaves   K leaves   P pairs
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.guide.expert import Expert, LeafRows


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScheme:
    """Which pairs of history items and targets an expert counts, and how."""

    window: int
    """Number of most recent history items that are counted."""
    decay: float
    """Weight of a history item relative to the next one."""
    smoothing: float
    """Constant added to the sum of the counts of a leaf, by which its counts are divided."""
    both: bool = False
    """Whether each pair is counted in both directions."""


TRANSITIONS = PairScheme(window=50, decay=0.6, smoothing=1.0)
COOCCURRENCE = PairScheme(window=10, decay=0.7, smoothing=2.0)
NEIGHBORS = PairScheme(window=3, decay=0.7, smoothing=2.0, both=True)
SHRINK = 5.0
"""Constant in the denominator of the cosine of `item_knn`."""


def transitions(rows: LeafRows) -> Expert:
    """Count what followed what: n(a, y) / (1 + n(a)), the last item of a history counting most.

    n sums .6^j over the rows with a at j items before the last one and target y.
    """
    return _conditional("transitions", rows, TRANSITIONS, decay=0.6)


def cooccurrence(rows: LeafRows) -> Expert:
    """Count forward pairs within ten items, as a conditional frequency with smoothing 2."""
    return _conditional("cooccurrence", rows, COOCCURRENCE, decay=0.7, window=10)


def neighbors(rows: LeafRows) -> Expert:
    """Count pairs within three items in both directions, as a conditional frequency.

    A policy trained on forward sequences has seen each pair in one order only.
    """
    return _conditional("neighbors", rows, NEIGHBORS, decay=0.7, window=10)


def item_knn(rows: LeafRows) -> Expert:
    """Compute the cosine of the users of two leaves, shrunk by 5 in the denominator."""
    together, num_users = distinct_users(rows)
    pairs = together.tocoo()
    apart = pairs.row != pairs.col
    before, after = pairs.row[apart], pairs.col[apart]
    cosine = pairs.data[apart] / (np.sqrt(num_users[before] * num_users[after]) + SHRINK)
    shape = (rows.num_leaves, rows.num_leaves)
    return _expert("item_knn", _matrix(before, after, cosine, shape), decay=0.9)


def distinct_users(rows: LeafRows) -> tuple[Any, Float64[np.ndarray, " K"]]:
    """Count the users of each pair of leaves, as a sparse matrix, and those of each leaf."""
    _, user = np.unique(rows.user, return_inverse=True)
    counted = rows.is_counted
    who = np.concatenate([user[ragged.row_of(rows.start)], user[counted]])
    what = np.concatenate([rows.history, rows.target[counted]])
    # One entry for each user and leaf, however often the user met it.
    pair = np.unique(who * rows.num_leaves + what)
    who, what = pair // rows.num_leaves, pair % rows.num_leaves
    bought = _matrix(who, what, np.ones(len(pair)), (int(user.max(initial=0)) + 1, rows.num_leaves))
    num_users = np.bincount(what, minlength=rows.num_leaves).astype(np.float64)
    return bought.T @ bought, num_users


def pair_entries(
    rows: LeafRows, scheme: PairScheme
) -> tuple[
    Int64[np.ndarray, " P"],
    Int64[np.ndarray, " P"],
    Int64[np.ndarray, " P"],
    Float64[np.ndarray, " P"],
]:
    """Return row, leaf before, leaf after and weight of each pair that a scheme counts.

    The weight of a history item j before the last one is decay^j, times that of its row.

    A row has one target, and the rows of a user have all their items but the first as targets, so
    that each pair of a user counts once.
    """
    before, start = ragged.last(rows.history, rows.start, scheme.window)
    age = np.repeat(start[1:], np.diff(start)) - 1 - np.arange(len(before))
    row = ragged.row_of(start)
    weight = scheme.decay ** age.astype(np.float64)
    if rows.weight is not None:
        kept = rows.is_counted[row]
        row, before, weight = row[kept], before[kept], weight[kept] * rows.weight[row[kept]]
    after = rows.target[row]
    if scheme.both:
        row, weight = np.concatenate([row, row]), np.concatenate([weight, weight])
        before, after = np.concatenate([before, after]), np.concatenate([after, before])
    return row, before, after, weight


def _matrix(
    before: Int64[np.ndarray, " P"],
    after: Int64[np.ndarray, " P"],
    weight: Float64[np.ndarray, " P"],
    shape: tuple[int, int],
) -> Any:
    """Return a CSR matrix with sorted columns; weights of equal pairs are summed."""
    matrix: Any = scipy.sparse.csr_array((weight, (before, after)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _conditional(
    name: str, rows: LeafRows, scheme: PairScheme, *, decay: float, window: int = 50
) -> Expert:
    """Divide the counts of each leaf before by their sum plus the smoothing."""
    _, before, after, weight = pair_entries(rows, scheme)
    counted = _matrix(before, after, weight, (rows.num_leaves, rows.num_leaves))
    total = np.asarray(counted.sum(1)).ravel()
    counted.data /= np.repeat(scheme.smoothing + total, np.diff(counted.indptr))
    return _expert(name, counted, decay=decay, window=window)


def _expert(name: str, matrix: Any, *, decay: float, window: int = 50) -> Expert:
    matrix.sort_indices()
    return Expert(
        name=name,
        start=matrix.indptr.astype(np.int64),
        after=matrix.indices.astype(np.int32),
        strength=matrix.data.astype(np.float32),
        decay=decay,
        window=window,
    )
