"""Experts: sparse scores of leaves after a history, from one item-to-item matrix each.

An expert scores a leaf y after a history h by

    e(h, y) = sum over the last items a of h, j before the last one, of decay^j M[a, y]

where M is sparse. Scores of a batch are computed at the leaves that the histories reach, so that
the cost does not depend on the size of the catalog.

Shapes:  B prompts   B1 = B + 1   H history leaves   K leaves   K1 = K + 1   P stored pairs
         T entries   X reached (prompt, leaf) pairs   E experts   Q queries
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import ConfigError

_KEY_BITS = 63
"""Number of bits of a non-negative int64, into which a key and its index are packed for sorting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafRows:
    """Rows of a split, with items as leaves of the catalog: what experts count."""

    num_leaves: int
    user: Int64[np.ndarray, " B"]
    """User of each row; rows of one user share items."""
    history: Int64[np.ndarray, " H"]
    """Leaves of the history items, oldest first."""
    start: Int64[np.ndarray, " B1"]
    target: Int64[np.ndarray, " B"]
    """Leaf of the item that followed each history."""
    weight: Float64[np.ndarray, " B"] | None = None
    """Weight of each row, 0 for one that is not counted; None if all are 1."""

    def __len__(self) -> int:
        return len(self.target)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows."""
        sha256 = hashlib.sha256(str(self.num_leaves).encode())
        for array in (self.user, self.history, self.start, self.target):
            sha256.update(np.ascontiguousarray(array, np.int64).data)
        if self.weight is not None:
            sha256.update(np.ascontiguousarray(self.weight).data)
        return sha256.hexdigest()

    @property
    def is_counted(self) -> Bool[np.ndarray, " B"]:
        """Mask of the rows with a weight."""
        return np.ones(len(self), np.bool_) if self.weight is None else self.weight > 0

    @property
    def popularity(self) -> Int64[np.ndarray, " K"]:
        """Number of counted rows with each leaf as target."""
        return np.bincount(self.target[self.is_counted], minlength=self.num_leaves)

    @property
    def repeat_rate(self) -> float:
        """Share of the counted rows whose target is a leaf of their own history."""
        again = self.history == self.target[ragged.row_of(self.start)]
        repeats = np.diff(ragged.starts(again.astype(np.int64))[self.start]) > 0
        return float(repeats[self.is_counted].mean())

    @classmethod
    def of_items(
        cls,
        catalog: Catalog,
        *,
        user: Int64[np.ndarray, " B"],
        history: Int64[np.ndarray, " H"],
        history_start: Int64[np.ndarray, " B1"],
        target: Int64[np.ndarray, " B"],
        weight: Float64[np.ndarray, " B"] | None = None,
    ) -> "LeafRows":
        """Look up the leaves of rows whose items are catalog rows."""
        leaf_of_item = catalog.leaf_of_item
        return cls(
            num_leaves=catalog.trie.num_leaves,
            user=user,
            history=leaf_of_item[history],
            start=history_start,
            target=leaf_of_item[target],
            weight=weight,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """Sparse matrix from leaves to leaves (CSR), and how it weighs a history."""

    name: str
    start: Int64[np.ndarray, " K1"]
    """Boundaries: the pairs with leaf a before are `start[a] : start[a + 1]`."""
    after: Int[np.ndarray, " P"]
    """Leaf after, of each pair."""
    strength: Float32[np.ndarray, " P"]
    """Entry of the matrix, not negative."""
    decay: float = 1.0
    """Weight of a history item relative to the next one; the last item has weight 1."""
    window: int = 50
    """Number of most recent history items that count."""

    def __post_init__(self) -> None:
        """Raise ConfigError where a score is negative or not finite."""
        wrong = ~(np.isfinite(self.strength) & (self.strength >= 0))
        if wrong.any():
            raise ConfigError(
                f"expert {self.name} gives the score {self.strength[int(np.argmax(wrong))]} "
                f"({int(wrong.sum())} of {len(wrong)} pairs); scores are at least 0 and finite, "
                "as log(1 + score) needs it"
            )
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"expert {self.name} has decay {self.decay}; take 0 to 1")

    @property
    def num_bytes(self) -> int:
        """Size of the matrix in bytes."""
        return self.start.nbytes + self.after.nbytes + self.strength.nbytes

    def strongest(self, most: int) -> "Expert":
        """Return the expert with the `most` strongest pairs of each leaf before, ties by leaf."""
        count = np.diff(self.start)
        if most <= 0 or int(count.max(initial=0)) <= most:
            return self
        owner = ragged.row_of(self.start)
        order = np.lexsort((self.after, -self.strength, owner))
        kept = np.sort(order[ragged.index_in_row(self.start) < most])
        return replace(
            self,
            start=ragged.starts(np.minimum(count, most)),
            after=self.after[kept],
            strength=self.strength[kept],
        )

    def entries(
        self, history: Int64[np.ndarray, " H"], start: Int64[np.ndarray, " B1"]
    ) -> tuple[Int64[np.ndarray, " T"], Int64[np.ndarray, " T"], Float64[np.ndarray, " T"]]:
        """Return prompt, leaf and score of every stored pair that the histories reach."""
        recent, bounds = ragged.last(history, start, self.window)
        # Number of items after each history item.
        age = np.repeat(bounds[1:], np.diff(bounds)) - 1 - np.arange(len(recent))
        first = self.start[recent]
        count = self.start[recent + 1] - first
        pair = ragged.ranges(first, count)
        prompt = np.repeat(ragged.row_of(bounds), count)
        score = self.strength[pair] * np.repeat(self.decay ** age.astype(np.float64), count)
        return prompt, self.after[pair].astype(np.int64), score


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertScores:
    """Scores of all experts at the leaves that the histories of a batch reach."""

    num_leaves: int
    key: Int64[np.ndarray, " X"]
    """Ascending distinct keys prompt * K + leaf; the leaves of the histories are among them."""
    score: Float64[np.ndarray, "X E"]
    seen: Bool[np.ndarray, " X"]
    """Whether the leaf is in the prompt's own history."""
    known: Bool[np.ndarray, " B"]
    """Whether any expert has a score after the prompt's history."""

    @property
    def prompt(self) -> Int64[np.ndarray, " X"]:
        """Prompt of each pair."""
        return self.key // self.num_leaves

    @property
    def leaf(self) -> Int64[np.ndarray, " X"]:
        """Leaf of each pair."""
        return self.key % self.num_leaves

    def lookup(
        self, prompt: Int64[np.ndarray, " Q"], leaf: Int64[np.ndarray, " Q"]
    ) -> tuple[Int64[np.ndarray, " Q"], Bool[np.ndarray, " Q"]]:
        """Return the index of each queried pair, and whether it was reached at all."""
        return lookup(self.key, prompt * self.num_leaves + leaf)


def lookup(
    key: Int64[np.ndarray, " X"], wanted: Int64[np.ndarray, " Q"]
) -> tuple[Int64[np.ndarray, " Q"], Bool[np.ndarray, " Q"]]:
    """Return the place of each wanted key among ascending keys, and whether it is there."""
    if not len(key):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    place = np.searchsorted(key, wanted)
    np.minimum(place, len(key) - 1, out=place)
    return place, key[place] == wanted


def expert_scores(
    experts: Sequence[Expert],
    history: Int64[np.ndarray, " H"],
    start: Int64[np.ndarray, " B1"],
    *,
    num_leaves: int,
) -> ExpertScores:
    """Score the leaves that the histories, given as leaves, reach.

    The scores of a prompt do not depend on the rest of the batch.
    """
    owner = ragged.row_of(start)
    parts = [expert.entries(history, start) for expert in experts]
    prompt = np.concatenate([*(part[0] for part in parts), owner])
    leaf = np.concatenate([*(part[1] for part in parts), history])
    size = [len(part[0]) for part in parts]
    key, place = distinct(prompt * num_leaves + leaf)
    score = np.zeros((len(key), len(experts)))
    first = 0
    for column, part in enumerate(parts):
        inside = place[first : first + size[column]]
        score[:, column] = np.bincount(inside, part[2], minlength=len(key))
        first += size[column]
    seen = np.zeros(len(key), np.bool_)
    seen[place[first:]] = True
    known = np.zeros(len(start) - 1, np.bool_)
    known[key[(score > 0).any(1)] // num_leaves] = True
    return ExpertScores(num_leaves=num_leaves, key=key, score=score, seen=seen, known=known)


def distinct(
    key: Int64[np.ndarray, " T"],
) -> tuple[Int64[np.ndarray, " X"], Int64[np.ndarray, " T"]]:
    """Return the distinct keys, ascending, and the place of each key among them.

    Keys and their indices are packed into plain integers where they fit, which sort several times
    faster than indices do.
    """
    bits = len(key).bit_length()
    if int(key.max(initial=0)).bit_length() + bits > _KEY_BITS:
        found, place = np.unique(key, return_inverse=True)
        return found, place
    packed = (key << bits) | np.arange(len(key))
    packed.sort()
    index = packed & ((1 << bits) - 1)
    packed >>= bits
    opens = np.ones(len(key), np.bool_)
    opens[1:] = packed[1:] != packed[:-1]
    place = np.empty(len(key), np.int64)
    place[index] = np.cumsum(opens) - 1
    return packed[opens], place
