"""Count the matrices of the built-in experts in the training rows.

Shapes:  B rows   H history leaves   P pairs
"""

from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.guide.expert import Expert, LeafRows


def transitions(rows: LeafRows) -> Expert:
    """Count what followed what: n(a, y) / (1 + n(a)), the last item of a history counting most.

    n sums .6^j over the rows with a at j items before the last one and target y.
    """
    return _conditional("transitions", _pairs(rows, window=50, decay=0.6), 1.0, decay=0.6)


def cooccurrence(rows: LeafRows) -> Expert:
    """Count forward pairs within ten items, as a conditional frequency with smoothing 2."""
    counted = _pairs(rows, window=10, decay=0.7)
    return _conditional("cooccurrence", counted, 2.0, decay=0.7, window=10)


def neighbors(rows: LeafRows) -> Expert:
    """Count pairs within three items in both directions, as a conditional frequency.

    A policy trained on forward sequences has seen each pair in one order only.
    """
    forward = _pairs(rows, window=3, decay=0.7)
    counted = (forward + forward.T).tocsr()
    return _conditional("neighbors", counted, 2.0, decay=0.7, window=10)


def item_knn(rows: LeafRows) -> Expert:
    """Compute the cosine of the users of two leaves, shrunk by 5 in the denominator."""
    _, user = np.unique(rows.user, return_inverse=True)
    who = np.concatenate([user[ragged.row_of(rows.start)], user])
    what = np.concatenate([rows.history, rows.target])
    # One entry for each user and leaf, however often the user met it.
    pair = np.unique(who * rows.num_leaves + what)
    who, what = pair // rows.num_leaves, pair % rows.num_leaves
    bought = _matrix(who, what, np.ones(len(pair)), (int(user.max(initial=0)) + 1, rows.num_leaves))
    together = (bought.T @ bought).tocoo()
    apart = together.row != together.col
    before, after = together.row[apart], together.col[apart]
    num_users = np.bincount(what, minlength=rows.num_leaves).astype(np.float64)
    cosine = together.data[apart] / (np.sqrt(num_users[before] * num_users[after]) + 5.0)
    shape = (rows.num_leaves, rows.num_leaves)
    return _expert("item_knn", _matrix(before, after, cosine, shape), decay=0.9)


def _pairs(rows: LeafRows, *, window: int, decay: float) -> Any:
    """Sum decay^j over the pairs of a target and a history item j before the last, up to a window.

    A row has one target, and the rows of a user have all their items but the first as targets, so
    that each pair of a user counts once.
    """
    before, start = ragged.last(rows.history, rows.start, window)
    age = np.repeat(start[1:], np.diff(start)) - 1 - np.arange(len(before))
    after = rows.target[ragged.row_of(start)]
    shape = (rows.num_leaves, rows.num_leaves)
    return _matrix(before, after, decay ** age.astype(np.float64), shape)


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
    name: str, counted: Any, smoothing: float, *, decay: float, window: int = 50
) -> Expert:
    """Divide the counts of each leaf before by their sum plus `smoothing`."""
    total = np.asarray(counted.sum(1)).ravel()
    scaled = counted.copy()
    scaled.data /= np.repeat(smoothing + total, np.diff(counted.indptr))
    return _expert(name, scaled, decay=decay, window=window)


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
