"""Find the items whose semantic IDs stand for points near an embedding.

A code stands for a centroid, and the codes of an item for the sum of theirs. Distances to all these
points come from tables of the codebooks, as in product quantization (Jegou, Douze and Schmid, IEEE
TPAMI 2011, asymmetric distance), without their coordinates.

Shapes:  N points   I items   L levels   D dimensions   K neighbors
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64


def nearest_items(
    points: Float32[np.ndarray, "N D"],
    books: Sequence[Float32[np.ndarray, "_ D"]],
    codes: Int[np.ndarray, "I L"],
    k: int,
) -> tuple[Int64[np.ndarray, "N K"], Float64[np.ndarray, "N K"]]:
    """Return the rows of the nearest items of each point, nearest first, and their distances.

    Args:
        points: points in the space of the codebooks.
        books: codebook of each level.
        codes: codes of the items.
        k: number of neighbors; all items where there are fewer.

    Returns:
        Rows of `codes`, the lower one first of a tie, and Euclidean distances.
    """
    k = min(k, len(codes))
    exact = [book.astype(np.float64) for book in books]
    length = _squared_lengths(exact, codes)
    rows, distances = np.empty((len(points), k), np.int64), np.empty((len(points), k))
    if k == 0:
        return rows, distances
    for number, point in enumerate(points.astype(np.float64)):
        product = sum(
            (book @ point)[codes[:, level]] for level, book in enumerate(exact)
        )  # of the point with the sum of each item's centroids
        squared = point @ point - 2 * product + length
        # All items as near as the k-th, so that ties are broken by row and not by the partition.
        limit = np.partition(squared, k - 1)[k - 1]
        near = np.flatnonzero(squared <= limit)
        near = near[np.argsort(squared[near], kind="stable")][:k]
        rows[number], distances[number] = near, np.sqrt(squared[near].clip(min=0))
    return rows, distances


def _squared_lengths(
    books: Sequence[Float64[np.ndarray, "_ D"]], codes: Int[np.ndarray, "I L"]
) -> Float64[np.ndarray, " I"]:
    """Return the squared length of the sum of each item's centroids."""
    total = np.zeros(len(codes))
    for level, book in enumerate(books):
        for other in range(level + 1):
            table = (1 + (other < level)) * (book @ books[other].T)
            total += table[codes[:, level], codes[:, other]]
    return total
