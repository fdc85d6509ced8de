"""Operations on ragged arrays, stored as one flat array and an array of row starts (CSR).

Shapes:  R rows   R1 = R + 1   M elements of all rows   Q queries
Row r holds the elements `start[r] : start[r + 1]`, so `start` has R + 1 entries.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Shaped


def starts(count: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R+1"]:
    """Return the start of each row, and the total length, from the row lengths."""
    start = np.zeros(len(count) + 1, dtype=np.int64)
    np.cumsum(count, out=start[1:])
    return start


def row_of(start: Int[np.ndarray, " R1"]) -> Int[np.ndarray, " M"]:
    """Return the row index of each element."""
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def index_in_row(start: Int[np.ndarray, " R1"]) -> Int[np.ndarray, " M"]:
    """Return the position of each element within its row."""
    return np.arange(int(start[-1])) - np.repeat(start[:-1], np.diff(start))


def ranges(first: Int[np.ndarray, " R"], count: Int[np.ndarray, " R"]) -> Int[np.ndarray, " M"]:
    """Concatenate the ranges `first[r], first[r] + 1, ...` of length `count[r]` of all rows."""
    start = starts(count)
    return np.arange(int(start[-1])) + np.repeat(np.asarray(first) - start[:-1], count)


def contains(
    values: Int[np.ndarray, " M"],
    start: Int[np.ndarray, " R1"],
    row: Int[np.ndarray, " Q"],
    query: Int[np.ndarray, " Q"],
) -> Bool[np.ndarray, " Q"]:
    """Return whether each query is among the elements of its row; all values are at least 0."""
    size = 1 + max(int(values.max(initial=0)), int(query.max(initial=0)))
    return np.isin(row * size + query, row_of(start) * size + values)


def take(
    values: Shaped[np.ndarray, "M ..."],
    start: Int[np.ndarray, " R1"],
    rows: Int[np.ndarray, " K"],
) -> tuple[Shaped[np.ndarray, "K2 ..."], Int[np.ndarray, " K+1"]]:
    """Select rows, in the given order, as a new ragged array; the others cost nothing."""
    count = start[np.asarray(rows) + 1] - start[rows]
    return values[ranges(start[rows], count)], starts(count)


def last(
    values: Shaped[np.ndarray, "M ..."], start: Int[np.ndarray, " R1"], most: int
) -> tuple[Shaped[np.ndarray, "K2 ..."], Int[np.ndarray, " R1"]]:
    """Keep the last `most` elements of each row, or all elements of a shorter row."""
    count = np.minimum(np.diff(start), most)
    return values[ranges(start[1:] - count, count)], starts(count)


def pad(
    values: Shaped[np.ndarray, " M"], start: Int[np.ndarray, " R1"], *, fill: int, width: int = 0
) -> Shaped[np.ndarray, "R W"]:
    """Return a dense table of the rows, padded on the right with `fill`.

    Its width W is the length of the longest row, or `width` if that is larger.
    """
    count = np.diff(start)
    table = np.full((len(count), max(width, int(count.max(initial=0)))), fill, values.dtype)
    table[row_of(start), index_in_row(start)] = values
    return table


def concatenate(
    parts: Sequence[tuple[Shaped[np.ndarray, "..."], Int[np.ndarray, " _"]]],
) -> tuple[Shaped[np.ndarray, "M2 ..."], Int[np.ndarray, " R2"]]:
    """Concatenate the rows of several ragged arrays."""
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([np.diff(start) for _, start in parts])
    return values, starts(counts)
