"""Quantize embeddings by residual k-means: each level quantizes the residual of the previous one.

Levels are plain or balanced. Balanced k-means assigns at most `ceil(items / codes)` items to a
code: after each update of the centroids, deferred acceptance computes a stable matching of items
to codes.

Shapes:  I items   E dimensions   L levels   C codes of one level
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Float64, Int64

from orchard.errors import DataError
from orchard.semantic_ids.projection import Projection

_faiss: Any = faiss
_ITERATIONS = 25
_BALANCED_ITERATIONS = 10
_TIE = 1e-5
"""Difference of two distances, relative to the squared lengths, that float32 may misjudge."""
_CELLS = 1 << 22
"""Differences of coordinates that are held at once."""


@dataclass(frozen=True, kw_only=True)
class CodedItems:
    """Codes of items, with what collisions are resolved by."""

    codes: Int64[np.ndarray, "I L"]
    codebook: tuple[Float32[np.ndarray, "_ E"], ...]
    """Centroids of each level."""
    last: Float32[np.ndarray, "I E"]
    """Input of the last level: the residual of all levels before it."""


@dataclass(frozen=True, kw_only=True)
class Quantized(CodedItems):
    """Codes of the items that codebooks were fitted to, with the fit's error."""

    error: Float64[np.ndarray, " L"]
    """Squared residual after each level, as a share of the variance of the embeddings."""
    projection: Projection
    """Map from embeddings to the space of the codebooks."""


def quantize(
    embedding: Float32[np.ndarray, "I E"],
    sizes: Sequence[int],
    *,
    balanced: bool = False,
    seed: int = 0,
) -> Quantized:
    """Quantize embeddings to codes of `len(sizes)` levels; equal seeds give equal codes.

    Raises:
        DataError: there are fewer distinct embeddings than codes at a level.
    """
    check_sizes(embedding, sizes)
    projection = Projection(mean=embedding.mean(axis=0))
    residual = projection(embedding)
    variance = float((residual.astype(np.float64) ** 2).sum())
    codes: list[Int64[np.ndarray, " I"]] = []
    books: list[Float32[np.ndarray, "_ E"]] = []
    errors: list[float] = []
    level_input = residual
    for level, size in enumerate(sizes):
        book = centroids(residual, size, seed + level)
        if balanced:
            book, code = _balance(residual, book)
        else:
            code = nearest(residual, book)
        level_input, residual = residual, residual - book[code]
        codes.append(code)
        books.append(book)
        errors.append(float((residual.astype(np.float64) ** 2).sum()) / variance)
    return Quantized(
        codes=np.stack(codes, axis=1),
        codebook=tuple(books),
        error=np.array(errors),
        last=level_input,
        projection=projection,
    )


def residual_codes(
    points: Float32[np.ndarray, "I E"],
    books: Sequence[Float32[np.ndarray, "_ E"]],
    *,
    balanced: bool = False,
) -> tuple[Int64[np.ndarray, "I L"], Float32[np.ndarray, "I E"]]:
    """Assign codes of fitted codebooks, level by level; return them and the last level's input.

    Plain codes of a point do not depend on the points beside it, balanced ones do: they are those
    of the items that the codebooks were fitted to.
    """
    codes: list[Int64[np.ndarray, " I"]] = []
    residual = level_input = points
    for book in books:
        if balanced:
            code = match(distances(residual, book), _capacity(points, book))
        else:
            code = nearest(residual, book)
        level_input, residual = residual, residual - book[code]
        codes.append(code)
    return np.stack(codes, axis=1), level_input


def check_sizes(embedding: Float32[np.ndarray, "I E"], sizes: Sequence[int]) -> None:
    """Raise DataError if there are fewer distinct embeddings than codes at a level."""
    distinct = len(np.unique(embedding, axis=0))
    if distinct < max(sizes):
        raise DataError(
            f"{len(embedding)} items have {distinct} distinct embeddings, a codebook of "
            f"{max(sizes)} needs at least as many; lower --levels"
        )


def centroids(
    points: Float32[np.ndarray, "I E"], size: int, seed: int
) -> Float32[np.ndarray, "C E"]:
    """Fit k-means to all points and return the centroids."""
    kmeans = _faiss.Kmeans(
        points.shape[1],
        size,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # no subsampling
    )
    kmeans.train(np.ascontiguousarray(points))
    return np.asarray(kmeans.centroids, dtype=np.float32)


def nearest(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> Int64[np.ndarray, " I"]:
    """Return the nearest code of each point, the lower one of a tie.

    The result for a point does not depend on the points beside it: near ties, which the blocks of a
    matrix product in float32 decide differently, are decided in float64.
    """
    index = _faiss.IndexFlatL2(book.shape[1])
    index.add(np.ascontiguousarray(book))
    points = np.ascontiguousarray(points)
    distance, found = index.search(points, min(2, len(book)))
    code = found[:, 0].astype(np.int64)
    if len(book) == 1:
        return code
    length = np.einsum("ie,ie->i", points, points) + np.einsum("ce,ce->c", book, book).max()
    close = np.flatnonzero(~(distance[:, 1] - distance[:, 0] > _TIE * length))
    exact_book, step = book.astype(np.float64), max(1, _CELLS // book.size)
    for first in range(0, len(close), step):
        rows = close[first : first + step]
        difference = points[rows, None, :].astype(np.float64) - exact_book  # [rows, C, E]
        code[rows] = (difference**2).sum(axis=-1).argmin(axis=1)
    return code


def distances(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> Float32[np.ndarray, "I C"]:
    """Compute the squared distance of every point to every centroid."""
    return np.asarray(_faiss.pairwise_distances(np.ascontiguousarray(points), book))


def _balance(
    points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]
) -> tuple[Float32[np.ndarray, "C E"], Int64[np.ndarray, " I"]]:
    """Alternate balanced matching and centroid updates; return centroids and codes."""
    capacity = _capacity(points, book)
    code = match(distances(points, book), capacity)
    for _ in range(_BALANCED_ITERATIONS):
        order = np.argsort(code, kind="stable")
        used, first, count = np.unique(code[order], return_index=True, return_counts=True)
        book = book.copy()
        book[used] = np.add.reduceat(points[order], first, axis=0) / count[:, None]
        new_code = match(distances(points, book), capacity)
        if (new_code == code).all():
            break
        code = new_code
    return book, code


def _capacity(points: Float32[np.ndarray, "I E"], book: Float32[np.ndarray, "C E"]) -> int:
    """Return the most items of a balanced code."""
    return -(-len(points) // len(book))


def match(distance: Float32[np.ndarray, "I C"], most: int) -> Int64[np.ndarray, " I"]:
    """Assign each item a code, at most `most` items to a code, by deferred acceptance.

    Every unmatched item proposes to the nearest code that has not refused it; a code keeps the
    nearest of its proposals and refuses the rest. The matching is stable and does not depend on
    the order of proposals.
    """
    preference = np.argsort(distance, axis=1, kind="stable")
    num_refusals = np.zeros(len(distance), dtype=np.int64)  # also the rank of the current proposal
    rows = np.arange(len(distance))
    while True:
        code = preference[rows, num_refusals]
        order = np.lexsort((rows, distance[rows, code], code))
        sorted_code = code[order]
        # first position of each item's code, so the difference is its rank among the proposals
        first = np.searchsorted(sorted_code, sorted_code)
        refused = order[np.arange(len(rows)) - first >= most]
        if len(refused) == 0:
            return code
        num_refusals[refused] += 1
