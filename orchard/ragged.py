"""Rows of unequal length as one flat array and an array of starts (CSR).

Shapes:  R rows   R1 = R + 1   M elements of all rows
Row r holds the elements `start[r] : start[r + 1]`, so `start` has R + 1 entries.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped


def starts(count: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R+1"]:
    """Where each row starts, given the row lengths."""
    start = np.zeros(len(count) + 1, dtype=np.int64)
    np.cumsum(count, out=start[1:])
    return start


def owners(start: Int[np.ndarray, " R1"]) -> Int[np.ndarray, " M"]:
    """The row of each element."""
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def places(start: Int[np.ndarray, " R1"]) -> Int[np.ndarray, " M"]:
    """The position of each element within its row."""
    return np.arange(int(start[-1])) - np.repeat(start[:-1], np.diff(start))


def ranges(first: Int[np.ndarray, " R"], count: Int[np.ndarray, " R"]) -> Int[np.ndarray, " M"]:
    """`first[r], first[r] + 1, ...` with `count[r]` terms, for all rows in one array."""
    start = starts(count)
    return np.arange(int(start[-1])) + np.repeat(np.asarray(first) - start[:-1], count)


def take(
    values: Shaped[np.ndarray, "M ..."],
    start: Int[np.ndarray, " R1"],
    rows: Int[np.ndarray, " K"],
) -> tuple[Shaped[np.ndarray, "K2 ..."], Int[np.ndarray, " K+1"]]:
    """The chosen rows, in the order asked for, as a new ragged array."""
    count = np.diff(start)[rows]
    return values[ranges(start[rows], count)], starts(count)


def last(
    values: Shaped[np.ndarray, "M ..."], start: Int[np.ndarray, " R1"], most: int
) -> tuple[Shaped[np.ndarray, "K2 ..."], Int[np.ndarray, " R1"]]:
    """The last `most` elements of each row, or all of a shorter one."""
    count = np.minimum(np.diff(start), most)
    return values[ranges(start[1:] - count, count)], starts(count)


def pad(
    values: Shaped[np.ndarray, " M"], start: Int[np.ndarray, " R1"], *, fill: int, width: int = 0
) -> Shaped[np.ndarray, "R W"]:
    """A dense table of the rows, filled on the right; W is the longest row or `width` if larger."""
    count = np.diff(start)
    table = np.full((len(count), max(width, int(count.max(initial=0)))), fill, values.dtype)
    table[owners(start), places(start)] = values
    return table


def concatenate(
    parts: Sequence[tuple[Shaped[np.ndarray, "..."], Int[np.ndarray, " _"]]],
) -> tuple[Shaped[np.ndarray, "M2 ..."], Int[np.ndarray, " R2"]]:
    """Several ragged arrays one after another as one."""
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([np.diff(start) for _, start in parts])
    return values, starts(counts)
