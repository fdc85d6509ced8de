"""Views of a catalog: the leaves that may be recommended, such as those of items in stock.

A node is live if a live leaf is at or below it. This is exact, so a search that enters only live
nodes never reaches a dead end, and can find every live leaf.

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
    """Immutable view of a catalog: its live leaves, live nodes and live-leaf counts."""

    catalog: str
    """Digest of the catalog; a view is not valid for another catalog."""
    live: Bool[Tensor, " N"]
    """Mask of the nodes with a live leaf at or below them."""
    count: tuple[Int[Tensor, " _"], ...]
    """Number of live leaves at or below each node, for each level that can have children, in the
    narrowest type of the level."""

    @property
    def num_leaves(self) -> int:
        """Number of live leaves."""
        return int(self.count[0][ROOT])

    @property
    def num_bytes(self) -> int:
        """Total size of all arrays in bytes."""
        return sum(tensor.nbytes for tensor in (self.live, *self.count))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the catalog digest and of the live nodes, which determine the counts."""
        sha256 = hashlib.sha256(self.catalog.encode())
        sha256.update(self.live.cpu().numpy().data)
        return sha256.hexdigest()

    def to(self, device: torch.device | str) -> "CatalogView":
        """Return the same view on another device."""
        count = tuple(tensor.to(device) for tensor in self.count)
        return replace(self, live=self.live.to(device), count=count)

    def num_live(self, node: Int64[Tensor, " F"]) -> Int64[Tensor, " F"]:
        """Count the live leaves at or below each node."""
        # A node below the counted levels is a leaf itself, which counts as 1 if it is live.
        number, level_start = self.live[node].long(), 0
        for count in self.count:
            index = node - level_start  # index of each node within the level
            in_level = (index >= 0) & (index < len(count))
            number = torch.where(in_level, count[index.clamp(0, len(count) - 1)].long(), number)
            level_start += len(count)
        return number


def view_of_leaves(trie: Trie, live: Bool[Tensor, " K"]) -> CatalogView:
    """Create the view of the given live leaves; each level takes one cumulative sum.

    Args:
        trie: the trie of the catalog.
        live: mask of the live leaves.
    """
    node_live = torch.zeros(trie.num_nodes, dtype=torch.bool, device=live.device)
    num_early = len(trie.early_leaf)
    node_live[trie.early_leaf], node_live[trie.num_inner :] = live[:num_early], live[num_early:]
    level_start = trie.level_start.tolist()
    below = node_live[level_start[-2] :]  # live leaves at or below each node of the level below
    count: list[Int[Tensor, " _"]] = []
    for first, end in reversed(list(pairwise(level_start[:-1]))):
        total = torch.zeros(len(below) + 1, dtype=torch.int32, device=live.device)
        torch.cumsum(below, 0, dtype=torch.int32, out=total[1:])
        # Start of the children of each node, relative to the level below.
        start = trie.child_start[first : end + 1] - end
        number = total[start[1:]] - total[start[:-1]]
        number += node_live[first:end]  # live leaves of this level itself
        node_live[first:end] = number > 0
        below = number
        if len(number):  # levels deeper than every sequence are empty
            count.append(number.to(_narrowest_type(int(number.max()))))
    return CatalogView(catalog=trie.catalog, live=node_live, count=tuple(reversed(count)))


def view_of_items(catalog: Catalog, live: Bool[np.ndarray, " I"]) -> CatalogView:
    """Create the view in which a leaf is live if any of its items is."""
    leaf_live = np.zeros(catalog.trie.num_leaves, dtype=np.bool_)
    leaf_live[catalog.leaf_of_item[live]] = True
    return view_of_leaves(catalog.trie, torch.from_numpy(leaf_live))


def full_view(trie: Trie) -> CatalogView:
    """Create the view of all leaves, the base of searches that exclude a few leaves."""
    return view_of_leaves(
        trie, torch.ones(trie.num_leaves, dtype=torch.bool, device=trie.code.device)
    )


def _narrowest_type(largest: int) -> torch.dtype:
    """Return the narrowest integer type that can hold the number."""
    types = (torch.int8, torch.int16, torch.int32)
    return next(kind for kind in types if largest <= torch.iinfo(kind).max)
