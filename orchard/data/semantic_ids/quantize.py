"""Residual quantisation by k-means: each level quantises what the levels before it left over.

Plain or balanced. Balanced k-means gives every code at most `ceil(items / codes)` items: after each
move of the centroids items are matched to codes so that no item and no code with a worse item would
rather have each other (deferred acceptance).

Shapes:  I items   E dimensions   L levels   C codes of one level
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.errors import DataError

_faiss: Any = faiss
_ITERATIONS = 25
_BALANCED_ITERATIONS = 10


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Codes and what they stand for."""

    codes: Int64[np.ndarray, "I L"]
    codebook: tuple[Float32[np.ndarray, "_ E"], ...]
    """Centroids of each level."""
    error: Float64[np.ndarray, " L"]
    """Squared residual after each level, as a share of the variance of the embeddings."""
    last: Float32[np.ndarray, "I E"]
    """What the last level had to quantise."""


def quantize(
    embedding: Float32[np.ndarray, "I E"],
    sizes: Sequence[int],
    *,
    balanced: bool = False,
    seed: int = 0,
) -> Quantized:
    """Codes of `len(sizes)` levels; equal seeds give equal codes.

    Raises:
        DataError: fewer distinct items than codes at a level.
    """
    check_sizes(embedding, sizes)
    rest = embedding - embedding.mean(axis=0)
    variance = float((rest.astype(np.float64) ** 2).sum())
    codes: list[Int64[np.ndarray, " I"]] = []
    books: list[Float32[np.ndarray, "_ E"]] = []
    errors: list[float] = []
    before = rest
    for level, size in enumerate(sizes):
        book = centroids(rest, size, seed + level)
        code = _nearest(rest, book)
        if balanced:
            book, code = _balance(rest, book)
        before, rest = rest, rest - book[code]
        codes.append(code)
        books.append(book)
        errors.append(float((rest.astype(np.float64) ** 2).sum()) / variance)
    return Quantized(
        codes=np.stack(codes, axis=1),
        codebook=tuple(books),
        error=np.array(errors),
        last=before,
    )


def check_sizes(embedding: Float32[np.ndarray, "I E"], sizes: Sequence[int]) -> None:
    """Raise DataError where there are fewer distinct items than codes at a level."""
    distinct = len(np.unique(embedding, axis=0))
    if distinct < max(sizes):
        raise DataError(
            f"{len(embedding)} items have {distinct} distinct embeddings, a codebook of "
            f"{max(sizes)} needs at least as many; lower --levels"
        )


def centroids(
    points: Float32[np.ndarray, "I E"], size: int, seed: int
) -> Float32[np.ndarray, "C E"]:
    """Those of k-means over all points."""
    maker = _faiss.Kmeans(
        points.shape[1],
        size,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # every item takes part
    )
    maker.train(np.ascontiguousarray(points))
    return np.asarray(maker.centroids, dtype=np.float32)


def _nearest(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> Int64[np.ndarray, " I"]:
    index = _faiss.IndexFlatL2(book.shape[1])
    index.add(book)
    return index.search(np.ascontiguousarray(points), 1)[1][:, 0].astype(np.int64)


def distances(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> Float32[np.ndarray, "I C"]:
    """Squared distance of every point to every centroid."""
    return np.asarray(_faiss.pairwise_distances(np.ascontiguousarray(points), book))


def _balance(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> tuple[Float32[np.ndarray, "C E"], Int64[np.ndarray, " I"]]:
    """Centroids moved to the means of the items that they get, and who gets which."""
    most = -(-len(points) // len(book))
    code = match(distances(points, book), most)
    for _ in range(_BALANCED_ITERATIONS):
        order = np.argsort(code, kind="stable")
        used, first, count = np.unique(code[order], return_index=True, return_counts=True)
        book = book.copy()
        book[used] = np.add.reduceat(points[order], first, axis=0) / count[:, None]
        moved = match(distances(points, book), most)
        if (moved == code).all():
            break
        code = moved
    return book, code


def match(distance: Float32[np.ndarray, "I C"], most: int) -> Int64[np.ndarray, " I"]:
    """A code for each item, at most `most` items to a code, by deferred acceptance.

    Every free item asks the nearest code that has not refused it; a code keeps the nearest of those
    that ask and refuses the rest. What comes out is stable, and does not depend on the order.
    """
    wish = np.argsort(distance, axis=1, kind="stable")
    asked = np.zeros(len(distance), dtype=np.int64)
    rows = np.arange(len(distance))
    while True:
        code = wish[rows, asked]
        order = np.lexsort((rows, distance[rows, code], code))
        sorted_code = code[order]
        first = np.searchsorted(sorted_code, sorted_code)
        refused = order[np.arange(len(rows)) - first >= most]
        if len(refused) == 0:
            return code
        asked[refused] += 1
