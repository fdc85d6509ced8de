"""Resolve collisions: items whose codes are equal.

Shapes:  I items   L levels   C codes of the last level   G members of one group
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64
from scipy.optimize import linear_sum_assignment

from orchard import ragged
from orchard.data.semantic_ids.quantize import Quantized, distances


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
    _, group_of_item = np.unique(codes, axis=0, return_inverse=True)
    group_of_item = group_of_item.reshape(-1)
    return np.argsort(group_of_item, kind="stable"), ragged.starts(np.bincount(group_of_item))


def extra_level(quantized: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
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


def reassign(quantized: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Assign free codes of the last level to colliding items at the least total distance.

    MiniOneRec also reassigns on the last level, by Sinkhorn's algorithm, without a guarantee
    (arXiv 2510.24431); this is the optimal assignment. An item for which no free code is left
    below its prefix keeps its code.
    """
    codes = quantized.codes.copy()
    order, start = groups(codes)
    colliding = np.zeros(len(codes), dtype=bool)  # [I] whether another item has the same codes
    colliding[order] = np.repeat(np.diff(start) > 1, np.diff(start))
    prefix_order, prefix_start = groups(codes[:, :-1])
    for start_index, end_index in pairwise(prefix_start):
        members = prefix_order[start_index:end_index]
        colliding_members = members[colliding[members]]
        if len(colliding_members) == 0:
            continue
        # [colliding members, C] distance of each residual to every code of the last level
        cost = distances(quantized.last[colliding_members], quantized.codebook[-1])
        is_free = np.ones(cost.shape[1], dtype=bool)
        is_free[codes[members[~colliding[members]], -1]] = False
        free_codes = np.flatnonzero(is_free)
        row, column = linear_sum_assignment(cost[:, free_codes])
        codes[colliding_members[row], -1] = free_codes[column]
    return keep(replace(quantized, codes=codes), prior)


def keep(quantized: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Keep all codes; list items of higher prior first within a group of equal codes."""
    listed = np.arange(len(quantized.codes))
    order, start = groups(quantized.codes)
    group_of_position = np.repeat(np.arange(len(start) - 1), np.diff(start))
    ranked = order[np.lexsort((order, -prior[order], group_of_position))]
    listed[order] = ranked  # a group keeps its positions in the file; its members are permuted
    return ResolvedCodes(codes=quantized.codes, order=listed)


POLICIES: Mapping[str, Callable[[Quantized, Float[np.ndarray, " I"]], ResolvedCodes]] = {
    "extra_level": extra_level,
    "reassign": reassign,
    "keep": keep,
}
"""Collision policies by name. To add one, add a function from quantized codes and a prior to
`ResolvedCodes`."""
