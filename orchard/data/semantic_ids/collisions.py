"""What becomes of items whose codes are equal.

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
    """Codes after a policy, and the order in which items are listed."""

    codes: Int64[np.ndarray, "I M"]
    order: Int64[np.ndarray, " I"]
    """Item rows; items that share codes are looked up in the order of the items file."""


def groups(codes: Int[np.ndarray, "I L"]) -> tuple[Int64[np.ndarray, " I"], Any]:
    """Items ordered by codes, and where each run of equal codes starts (one entry more)."""
    _, owner = np.unique(codes, axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    return np.argsort(owner, kind="stable"), ragged.starts(np.bincount(owner))


def extra_level(made: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """One level more: the place of an item among those that share its codes, by the prior."""
    codes = made.codes
    order, start = groups(codes)
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = order[np.lexsort((order, -prior[order], owner))]
    place = np.empty(len(codes), dtype=np.int64)
    place[order] = ragged.places(start)
    return ResolvedCodes(
        codes=np.concatenate([codes, place[:, None]], axis=1), order=np.arange(len(codes))
    )


def reassign(made: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Colliding items share out the free codes of the last level at the least total distance.

    MiniOneRec re-assigns on the last level as well, by Sinkhorn's algorithm and without a promise
    (arXiv 2510.24431); this is the optimal assignment. What finds no free code below its prefix
    keeps the code that it has.
    """
    codes = made.codes.copy()
    order, start = groups(codes)
    colliding = np.zeros(len(codes), dtype=bool)
    colliding[order] = np.repeat(np.diff(start) > 1, np.diff(start))
    prefix_order, prefix_start = groups(codes[:, :-1])
    for low, high in pairwise(prefix_start):
        members = prefix_order[low:high]
        moving = members[colliding[members]]
        if len(moving) == 0:
            continue
        cost = distances(made.last[moving], made.codebook[-1])
        free = np.ones(cost.shape[1], dtype=bool)
        free[codes[members[~colliding[members]], -1]] = False
        codes_free = np.flatnonzero(free)
        row, column = linear_sum_assignment(cost[:, codes_free])
        codes[moving[row], -1] = codes_free[column]
    return keep(replace(made, codes=codes), prior)


def keep(made: Quantized, prior: Float[np.ndarray, " I"]) -> ResolvedCodes:
    """Leave them; within a group the items of higher prior are listed first."""
    listed = np.arange(len(made.codes))
    order, start = groups(made.codes)
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    ranked = order[np.lexsort((order, -prior[order], owner))]
    listed[order] = ranked  # the places of a group stay, its members change among them
    return ResolvedCodes(codes=made.codes, order=listed)


POLICIES: Mapping[str, Callable[[Quantized, Float[np.ndarray, " I"]], ResolvedCodes]] = {
    "extra_level": extra_level,
    "reassign": reassign,
    "keep": keep,
}
"""To add one, add a function from codes and a prior to codes and an order."""
