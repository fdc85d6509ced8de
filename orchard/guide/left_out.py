"""Expert scores as they were without some of the counted rows.

A row that was counted hears of its own target in the counts, which no new row does. Here the counts
behind an expert are kept whole, and for each prompt those of its own row, or of all rows of its
user, are taken out before a score is computed: the result is that of an expert counted anew.

Shapes:  K leaves   Q queried pairs   P counted pairs   O left-out rows
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64

from orchard.guide.count import (
    COOCCURRENCE,
    NEIGHBORS,
    SHRINK,
    TRANSITIONS,
    PairScheme,
    distinct_users,
    pair_entries,
)
from orchard.guide.expert import LeafRows, lookup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums of weights by ascending distinct keys."""

    key: Int64[np.ndarray, " P"]
    weight: Float64[np.ndarray, " P"]

    @classmethod
    def by(cls, key: Int64[np.ndarray, " T"], weight: Float64[np.ndarray, " T"]) -> "Sums":
        """Sum weights by key."""
        found, place = np.unique(key, return_inverse=True)
        summed = np.bincount(place, weight, minlength=len(found))  # of integers if there are none
        return cls(key=found, weight=summed.astype(np.float64))

    def of(self, key: Int64[np.ndarray, " Q"]) -> Float64[np.ndarray, " Q"]:
        """Return the sums of keys, 0 for keys that never occurred."""
        if not len(self.key):
            return np.zeros(len(key))
        place, found = lookup(self.key, key)
        return np.where(found, self.weight[place], 0.0)


@runtime_checkable
class Remaining(Protocol):
    """Counts with the left-out rows of each prompt taken out."""

    def strength(
        self,
        prompt: Int64[np.ndarray, " Q"],
        before: Int64[np.ndarray, " Q"],
        after: Int64[np.ndarray, " Q"],
    ) -> Float64[np.ndarray, " Q"]:
        """Return the entries of the expert's matrix at pairs of leaves."""
        ...

    def known(
        self, prompt: Int64[np.ndarray, " Q"], before: Int64[np.ndarray, " Q"]
    ) -> Bool[np.ndarray, " Q"]:
        """Return whether the row of a leaf before has any entry."""
        ...


@runtime_checkable
class Counted(Protocol):
    """Counts behind an expert."""

    unit: Literal["row", "user"]
    """Rows that are left out for a prompt: its own, or all of its user."""

    def without(self, rows: LeafRows, prompt: Int64[np.ndarray, " O"]) -> Remaining:
        """Take rows out of the counts, each for the prompt with the given index."""
        ...


CountFactory = Callable[[LeafRows], Counted]
"""Factory of the counts behind an expert from the training rows."""


class PairCounts:
    """Counted pairs behind an expert of conditional frequencies n(a, y) / (smoothing + n(a))."""

    def __init__(self, rows: LeafRows, scheme: PairScheme, unit: Literal["row", "user"]) -> None:
        """Count the pairs of rows."""
        self.unit: Literal["row", "user"] = unit
        self.scheme, self.num_leaves = scheme, rows.num_leaves
        _, before, after, weight = pair_entries(rows, scheme)
        self.pairs = Sums.by(before * rows.num_leaves + after, weight)
        self.total = np.bincount(before, weight, minlength=rows.num_leaves)
        self.number = np.bincount(before, minlength=rows.num_leaves)  # whole, and so without error

    def without(self, rows: LeafRows, prompt: Int64[np.ndarray, " O"]) -> Remaining:
        """Take rows out of the counts, each for the prompt with the given index."""
        row, before, after, weight = pair_entries(rows, self.scheme)
        owned = prompt[row] * self.num_leaves + before
        return _RemainingPairs(
            whole=self,
            pairs=Sums.by(owned * self.num_leaves + after, weight),
            total=Sums.by(owned, weight),
            number=Sums.by(owned, np.ones(len(owned))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RemainingPairs:
    """Counted pairs with those of each prompt's left-out rows taken out."""

    whole: PairCounts
    pairs: Sums
    total: Sums
    number: Sums

    def strength(
        self,
        prompt: Int64[np.ndarray, " Q"],
        before: Int64[np.ndarray, " Q"],
        after: Int64[np.ndarray, " Q"],
    ) -> Float64[np.ndarray, " Q"]:
        """Return n(a, y) / (smoothing + n(a)) of what is left."""
        size, owned = self.whole.num_leaves, prompt * self.whole.num_leaves + before
        count = self.whole.pairs.of(before * size + after) - self.pairs.of(owned * size + after)
        total = self.whole.total[before] - self.total.of(owned)
        return np.maximum(count, 0.0) / (self.whole.scheme.smoothing + np.maximum(total, 0.0))

    def known(
        self, prompt: Int64[np.ndarray, " Q"], before: Int64[np.ndarray, " Q"]
    ) -> Bool[np.ndarray, " Q"]:
        """Return whether any pair of a leaf before is left."""
        owned = prompt * self.whole.num_leaves + before
        return self.whole.number[before] - self.number.of(owned) > 0


class UserCounts:
    """Users of leaves and of pairs of leaves, behind the expert `item_knn`."""

    unit: Literal["row", "user"] = "user"

    def __init__(self, rows: LeafRows) -> None:
        """Count the users of rows."""
        self.num_leaves = rows.num_leaves
        together, users = distinct_users(rows)
        pairs = together.tocoo()
        apart = pairs.row != pairs.col
        before, after = pairs.row[apart].astype(np.int64), pairs.col[apart].astype(np.int64)
        self.pairs = Sums.by(before * rows.num_leaves + after, pairs.data[apart])
        self.number = np.bincount(before, pairs.data[apart], minlength=rows.num_leaves)
        self.users = users

    def without(self, rows: LeafRows, prompt: Int64[np.ndarray, " O"]) -> Remaining:
        """Take the users of rows out of the counts, each for the prompt with the given index."""
        owner, counted = np.repeat(prompt, np.diff(rows.start)), rows.is_counted
        key = np.concatenate([owner, prompt[counted]]) * rows.num_leaves
        own = np.unique(key + np.concatenate([rows.history, rows.target[counted]]))
        return _RemainingUsers(
            whole=self,
            own=Sums(key=own, weight=np.ones(len(own))),
            size=Sums.by(own // rows.num_leaves, np.ones(len(own))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _RemainingUsers:
    """Counted users without the user of each prompt."""

    whole: UserCounts
    own: Sums
    """Whether the prompt's user has a leaf, by prompt * K + leaf."""
    size: Sums
    """Number of distinct leaves of the prompt's user, by prompt."""

    def strength(
        self,
        prompt: Int64[np.ndarray, " Q"],
        before: Int64[np.ndarray, " Q"],
        after: Int64[np.ndarray, " Q"],
    ) -> Float64[np.ndarray, " Q"]:
        """Return the shrunk cosine of what is left; 0 between a leaf and itself."""
        size = self.whole.num_leaves
        has_before = self.own.of(prompt * size + before)
        has_after = self.own.of(prompt * size + after)
        count = self.whole.pairs.of(before * size + after) - has_before * has_after
        users = self.whole.users[before] - has_before, self.whole.users[after] - has_after
        count[before == after] = 0.0
        return np.maximum(count, 0.0) / (np.sqrt(users[0] * users[1]) + SHRINK)

    def known(
        self, prompt: Int64[np.ndarray, " Q"], before: Int64[np.ndarray, " Q"]
    ) -> Bool[np.ndarray, " Q"]:
        """Return whether another user has a leaf before together with any other leaf."""
        has = self.own.of(prompt * self.whole.num_leaves + before)
        return self.whole.number[before] - has * (self.size.of(prompt) - 1) > 0


def count_transitions(rows: LeafRows) -> Counted:
    """Count the pairs behind `transitions`, of which a prompt's own row is left out."""
    return PairCounts(rows, TRANSITIONS, "row")


def count_cooccurrence(rows: LeafRows) -> Counted:
    """Count the pairs behind `cooccurrence`, of which those of the prompt's user are left out."""
    return PairCounts(rows, COOCCURRENCE, "user")


def count_neighbors(rows: LeafRows) -> Counted:
    """Count the pairs behind `neighbors`, of which those of the prompt's user are left out."""
    return PairCounts(rows, NEIGHBORS, "user")
