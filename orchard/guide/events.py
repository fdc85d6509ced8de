"""Events: what was bought after what since a guide was counted, and the guide that has learned it.

An event is a row as those that the experts were counted in: a history, and the item that followed.
Its pairs are added to the counts of each expert of conditional frequencies n(a, y) / (s + n(a)).
The counts behind a fitted matrix follow from it: with S the sum of the row of a leaf a, n(a) is
s S / (1 - S). Where a guide keeps only the strongest pairs of a leaf (`guide.pairs`), n(a) is
too small, and events count for more. Other experts, as `item_knn`, stay as they are.

Shapes:  E events   E1 = E + 1   H history items   K leaves   P pairs
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.guide.count import PairScheme, pair_entries
from orchard.guide.expert import Expert, LeafRows
from orchard.guide.guide import Guide
from orchard.guide.registry import EXPERTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """Events by the identifiers of their items, whether or not a catalog has these. Immutable."""

    version: int = 0
    """Number of changes that have led to these events."""
    history: Int64[np.ndarray, " H"]
    """Items of all histories, oldest first."""
    start: Int64[np.ndarray, " E1"]
    item: Int64[np.ndarray, " E"]
    """Item that followed each history."""

    def __len__(self) -> int:
        return len(self.item)

    def followed_by(
        self,
        history: Int64[np.ndarray, " H2"],
        start: Int64[np.ndarray, " F1"],
        item: Int64[np.ndarray, " F"],
        *,
        forget: bool = False,
    ) -> "Events":
        """Return the next version, with further events; with `forget`, with these alone."""
        before = NONE if forget else self
        return Events(
            version=self.version + 1,
            history=np.concatenate([before.history, history]),
            start=np.concatenate([before.start, before.start[-1] + start[1:]]),
            item=np.concatenate([before.item, item]),
        )

    def rows(self, catalog: Catalog) -> LeafRows:
        """Return the events that a catalog can tell, without the history items that it lacks."""
        row, is_known = catalog.lookup(self.history)
        target, counts = catalog.lookup(self.item)
        owner = ragged.row_of(self.start)
        kept = is_known & counts[owner]
        length = np.bincount(owner[kept], minlength=len(self))[counts]
        return LeafRows.of_items(
            catalog,
            user=np.arange(int(counts.sum())),
            history=row[kept],
            history_start=ragged.starts(length),
            target=target[counts],
        )


NONE = Events(
    history=np.zeros(0, np.int64), start=np.zeros(1, np.int64), item=np.zeros(0, np.int64)
)
"""No events."""


def with_events(guide: Guide, events: Events) -> Guide:
    """Return the guide with the events added to its counts and to its popularity."""
    rows = events.rows(guide.catalog)
    if not len(rows):
        return guide
    experts = tuple(
        _added(expert, rows, scheme) if (scheme := _scheme(expert)) is not None else expert
        for expert in guide.experts
    )
    popularity = guide.popularity + np.bincount(rows.target, minlength=rows.num_leaves)
    return replace(guide, experts=experts, popularity=popularity)


def _scheme(expert: Expert) -> PairScheme | None:
    """Return which pairs an expert counts; None if it does not count pairs."""
    return EXPERTS.facts(expert.name).pairs if expert.name in EXPERTS else None


def _added(expert: Expert, rows: LeafRows, scheme: PairScheme) -> Expert:
    """Return an expert of conditional frequencies with the pairs of further rows."""
    _, before, after, weight = pair_entries(rows, scheme)
    size = rows.num_leaves
    changed = np.zeros(size, np.bool_)
    changed[before] = True
    owner = ragged.row_of(expert.start)
    mine = changed[owner]
    # Smoothed sums of the counts of the changed leaves: s + n(a) = s / (1 - S).
    total = np.bincount(owner[mine], expert.strength[mine].astype(np.float64), minlength=size)
    smoothed = scheme.smoothing / np.maximum(1 - total, 1e-6)
    count = expert.strength[mine] * smoothed[owner[mine]]
    smoothed += np.bincount(before, weight, minlength=size)
    # Sums of old and new counts, divided row by row; other rows keep every bit.
    both_before, both_after = (
        np.concatenate(pair) for pair in ((owner[mine], before), (expert.after[mine], after))
    )
    counted = scipy.sparse.csr_array(
        (np.concatenate([count, weight]), (both_before, both_after)), shape=(size, size)
    )
    counted.sum_duplicates()
    new_owner = np.repeat(np.arange(size), np.diff(counted.indptr))
    strength = (counted.data / smoothed[new_owner]).astype(np.float32)
    matrix = scipy.sparse.csr_array(
        (
            np.concatenate([expert.strength[~mine], strength]),
            (
                np.concatenate([owner[~mine], new_owner]),
                np.concatenate([expert.after[~mine], counted.indices]),
            ),
        ),
        shape=(size, size),
    )
    matrix.sort_indices()
    return replace(
        expert,
        start=matrix.indptr.astype(np.int64),
        after=matrix.indices.astype(np.int32),
        strength=matrix.data.astype(np.float32),
    )
