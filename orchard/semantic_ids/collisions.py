"""Resolve collisions: items whose codes are equal.

Shapes:  I items   L levels   C codes of the last level   G members of one group   T other items
         U codes of these below one prefix
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64
from scipy.optimize import linear_sum_assignment

from orchard import arrays, ragged
from orchard.semantic_ids.quantize import CodedItems, distances


@dataclass(frozen=True, kw_only=True)
class ResolvedCodes:
    """Codes with collisions resolved, and the order in which to write the items."""

    codes: Int64[np.ndarray, "I M"]
    order: Int64[np.ndarray, " I"]
    """Item rows in the order of the items file, which ranks items that share codes."""


def groups(codes: Int[np.ndarray, "I L"]) -> tuple[Int64[np.ndarray, " I"], Any]:
    """Sort items by codes; return the order and the starts of the groups of equal codes.

    The starts have one entry more than there are groups.
    """
    key = arrays.row_keys(codes)
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order], prepend=-1))
    return order, np.append(first, len(codes))


def extra_level(quantized: CodedItems, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Append a level with the rank of an item, by the prior, among those that share its codes."""
    codes = quantized.codes
    order, start = groups(codes)
    group_of_position = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = order[np.lexsort((order, -prior[order], group_of_position))]
    rank_in_group = np.empty(len(codes), dtype=np.int64)
    rank_in_group[order] = ragged.index_in_row(start)
    return ResolvedCodes(
        codes=np.concatenate([codes, rank_in_group[:, None]], axis=1), order=np.arange(len(codes))
    )


def reassign(quantized: CodedItems, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Assign free codes of the last level to colliding items at the least total distance.

    MiniOneRec also reassigns on the last level, by Sinkhorn's algorithm, without a guarantee
    (arXiv 2510.24431); this is the optimal assignment. An item for which no free code is left
    below its prefix keeps its code.
    """
    codes = quantized.codes.copy()
    codes[:, -1], _ = free_codes(quantized, np.empty((0, codes.shape[1]), dtype=np.int64))
    return keep(replace(quantized, codes=codes), prior)


def free_codes(
    quantized: CodedItems, taken: Int[np.ndarray, "T L"]
) -> tuple[Int64[np.ndarray, " I"], Bool[np.ndarray, " I"]]:
    """Give each item a code of the last level that no other item has below its prefix.

    An item alone on a free code keeps it; the others of a prefix take those that are left, at the
    least total squared distance.

    Args:
        quantized: the items.
        taken: codes of other items, which stay as they are.

    Returns:
        The last codes, and which items were left without: they have the code of the quantizer.
    """
    last = quantized.codes[:, -1].copy()
    left_without = np.zeros(len(last), dtype=bool)
    for members, used in _below_prefixes(quantized.codes, taken):
        is_free = np.ones(len(quantized.codebook[-1]), dtype=bool)
        is_free[used] = False
        own = last[members]
        is_alone = is_free[own] & (np.bincount(own)[own] == 1)
        if is_alone.all():
            continue
        is_free[own[is_alone]] = False
        movers, free = members[~is_alone], np.flatnonzero(is_free)
        # [movers, free codes] distance of each residual to every free code of the last level
        cost = distances(quantized.last[movers], quantized.codebook[-1])[:, free]
        row, column = linear_sum_assignment(cost)
        last[movers[row]] = free[column]
        left_without[np.delete(movers, row)] = True
    return last, left_without


def free_ranks(
    quantized: CodedItems, taken: Int[np.ndarray, "T L1"], num_ranks: int
) -> tuple[Int64[np.ndarray, " I"], Bool[np.ndarray, " I"]]:
    """Give each item the lowest free rank, in their order, among those that share its codes.

    Returns:
        The ranks, and which items were left without one of `num_ranks`: they have the last rank.
    """
    rank = np.full(len(quantized.codes), num_ranks - 1, dtype=np.int64)
    left_without = np.zeros(len(rank), dtype=bool)
    extended = np.pad(quantized.codes, ((0, 0), (0, 1)))
    for members, used in _below_prefixes(extended, taken):
        free = np.setdiff1d(np.arange(num_ranks), used)[: len(members)]
        rank[members[: len(free)]] = free
        left_without[members[len(free) :]] = True
    return rank, left_without


def _below_prefixes(
    codes: Int[np.ndarray, "I L"], taken: Int[np.ndarray, "T L"]
) -> Iterator[tuple[Int64[np.ndarray, " G"], Int[np.ndarray, " U"]]]:
    """Yield the items below each prefix, and the last codes that are taken there."""
    key = arrays.row_keys(np.concatenate([codes[:, :-1], taken[:, :-1]]))
    key, taken_key = key[: len(codes)], key[len(codes) :]
    is_met = np.isin(taken_key, key)
    taken_key, taken_last = taken_key[is_met], taken[is_met, -1]
    order, taken_order = np.argsort(key, kind="stable"), np.argsort(taken_key, kind="stable")
    key, taken_key, taken_last = key[order], taken_key[taken_order], taken_last[taken_order]
    start = np.append(np.flatnonzero(np.diff(key, prepend=-1)), len(key))
    first = np.searchsorted(taken_key, key[start[:-1]])
    end = np.searchsorted(taken_key, key[start[:-1]], side="right")
    for group, (begin, stop) in enumerate(pairwise(start)):
        yield order[begin:stop], taken_last[first[group] : end[group]]


def keep(quantized: CodedItems, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Keep all codes; list items of higher prior first within a group of equal codes."""
    listed = np.arange(len(quantized.codes))
    order, start = groups(quantized.codes)
    group_of_position = np.repeat(np.arange(len(start) - 1), np.diff(start))
    ranked = order[np.lexsort((order, -prior[order], group_of_position))]
    listed[order] = ranked  # a group keeps its positions in the file; its members are permuted
    return ResolvedCodes(codes=quantized.codes, order=listed)


POLICIES: Mapping[str, Callable[[CodedItems, Float[np.ndarray, " I"]], ResolvedCodes]] = {
    "extra_level": extra_level,
    "reassign": reassign,
    "keep": keep,
}
"""Collision policies by name. To add one, add a function from quantized codes and a prior to
`ResolvedCodes`."""
