"""Which leaves of a catalog may be recommended: what is in stock, allowed here, fresh this week.

A node is live if a live leaf is at or below it. That is exact, so a search that enters live nodes
only meets no dead end, and finds as many leaves as are live.

Shapes:  N trie nodes   K leaves   I items   F queried nodes
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT, Trie


@dataclass(frozen=True, kw_only=True)
class CatalogView:
    """The live leaves of one catalog, and all that follows from them. Immutable."""

    catalog: str
    """Digest of the catalog; a view of another one says nothing about this."""
    live: Bool[Tensor, " N"]
    """If a live leaf is at or below the node."""
    count: tuple[Int[Tensor, " _"], ...]
    """For each level that may have children the number of live leaves at or below each of its
    nodes, as narrow as it allows."""

    @property
    def num_leaves(self) -> int:
        """Number of live leaves."""
        return int(self.count[0][ROOT])

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in (self.live, *self.count))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the catalog's digest and of what is live, from which the rest follows."""
        seal = hashlib.sha256(self.catalog.encode())
        seal.update(self.live.cpu().numpy().data)
        return seal.hexdigest()

    def to(self, device: torch.device | str) -> "CatalogView":
        """The same view on another device."""
        count = tuple(part.to(device) for part in self.count)
        return replace(self, live=self.live.to(device), count=count)

    def num_live(self, node: Int64[Tensor, " F"]) -> Int64[Tensor, " F"]:
        """Number of live leaves at or below each node."""
        number, first = self.live[node].long(), 0
        for count in self.count:
            place = node - first
            here = (place >= 0) & (place < len(count))
            number = torch.where(here, count[place.clamp(0, len(count) - 1)].long(), number)
            first += len(count)
        return number


def view_of_leaves(trie: Trie, live: Bool[Tensor, " K"]) -> CatalogView:
    """The view in which these leaves are live: per level one cumulative sum over its children."""
    node_live = torch.zeros(trie.num_nodes, dtype=torch.bool, device=live.device)
    early = len(trie.early_leaf)
    node_live[trie.early_leaf], node_live[trie.num_inner :] = live[:early], live[early:]
    level = trie.level_start.tolist()
    below = node_live[level[-2] :]
    count: list[Int[Tensor, " _"]] = []
    for first, end in reversed(list(pairwise(level[:-1]))):
        total = torch.zeros(len(below) + 1, dtype=torch.int32, device=live.device)
        torch.cumsum(below, 0, dtype=torch.int32, out=total[1:])
        start = trie.child_start[first : end + 1] - end
        number = total[start[1:]] - total[start[:-1]]
        number += node_live[first:end]  # leaves of this level
        node_live[first:end] = number > 0
        below = number
        if len(number):  # deeper levels than any sequence has are empty
            count.append(number.to(_narrow(int(number.max()))))
    return CatalogView(catalog=trie.catalog, live=node_live, count=tuple(reversed(count)))


def view_of_items(catalog: Catalog, live: Bool[np.ndarray, " I"]) -> CatalogView:
    """The view in which a leaf is live if any of its items is."""
    leaf = np.zeros(catalog.trie.num_leaves, dtype=np.bool_)
    leaf[catalog.leaf_of_item[live]] = True
    return view_of_leaves(catalog.trie, torch.from_numpy(leaf))


def full_view(trie: Trie) -> CatalogView:
    """The view that forbids nothing; searches that exclude a few leaves start from it."""
    return view_of_leaves(
        trie, torch.ones(trie.num_leaves, dtype=torch.bool, device=trie.code.device)
    )


def _narrow(largest: int) -> torch.dtype:
    types = (torch.int8, torch.int16, torch.int32)
    return next(kind for kind in types if largest <= torch.iinfo(kind).max)
