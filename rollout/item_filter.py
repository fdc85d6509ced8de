"""Restrict a search to the live leaves of a view, to those below a prefix, or without some.

The policy does not change: it stays the softmax over all legal codes of the catalog, and searches
report its own log-probabilities. The filter only decides which prefixes a search may enter.

Shapes:  B prompts   X excluded leaves of all prompts   M queried nodes   K dead nodes
         P nodes above excluded leaves   R selected prompts   B1 = B + 1
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT, Trie
from orchard.catalog.view import CatalogView
from orchard.errors import CatalogError


@dataclass(frozen=True, kw_only=True)
class ItemFilter:
    """Catalog view shared by a batch, and the excluded leaves of each prompt."""

    view: CatalogView
    excluded: Int64[np.ndarray, " X"]
    """Excluded leaves, in any order, repeats allowed; a leaf excludes all items that share it."""
    excluded_start: Int64[np.ndarray, " B1"]
    """Boundaries: prompt b excludes `excluded[excluded_start[b] : excluded_start[b + 1]]`."""
    prefix: Int64[np.ndarray, " B"] | None = None
    """Trie node that the path of every allowed leaf of a prompt passes; None for no such bound."""

    def select(self, rows: Int64[np.ndarray, " R"]) -> "ItemFilter":
        """Return the filter of the prompts `rows`, in that order."""
        excluded, start = ragged.take(self.excluded, self.excluded_start, rows)
        prefix = None if self.prefix is None else self.prefix[rows]
        return ItemFilter(view=self.view, excluded=excluded, excluded_start=start, prefix=prefix)


@dataclass(frozen=True, kw_only=True)
class PrefixMask:
    """Mask of the trie nodes that each prompt of a search may enter."""

    view: CatalogView
    dead: Int64[Tensor, " K"]
    """Ascending keys prompt * N + node of nodes that are live in the view, but not for the
    prompt."""
    excluded: Int64[Tensor, " P"]
    """Ascending keys prompt * N + node of the nodes with an excluded live leaf at or below them."""
    num_excluded: Int64[Tensor, " P"]
    """Number of excluded live leaves at or below each of them."""
    below: "_Below | None" = None
    """Prefix of each prompt, which allowed leaves share."""

    def num_allowed(
        self, prompt: Int64[Tensor, " M"], node: Int64[Tensor, " M"]
    ) -> Int64[Tensor, " M"]:
        """Count the allowed leaves of the prompt at or below each node; without `below` only."""
        number = self.view.num_live(node)
        if len(self.excluded) == 0:
            return number
        key = prompt * len(self.view.live) + node
        index = torch.searchsorted(self.excluded, key).clamp(max=len(self.excluded) - 1)
        return number - self.num_excluded[index] * (self.excluded[index] == key)

    def allows(self, prompt: Int64[Tensor, " M"], node: Int64[Tensor, " M"]) -> Bool[Tensor, " M"]:
        """Return whether an allowed leaf of the prompt is at or below each node."""
        live = self.view.live[node]
        if self.below is not None:
            live &= self.below.allows(prompt, node)
        if len(self.dead) == 0:
            return live
        key = prompt * len(self.view.live) + node
        index = torch.searchsorted(self.dead, key).clamp(max=len(self.dead) - 1)
        return live & (self.dead[index] != key)


@dataclass(frozen=True, kw_only=True)
class _Below:
    """Mask of the nodes on the way to a prefix of each prompt, and of those below it."""

    trie: Trie
    node: Int64[Tensor, " B"]
    """Trie node of each prompt's prefix."""

    def allows(self, prompt: Int64[Tensor, " M"], node: Int64[Tensor, " M"]) -> Bool[Tensor, " M"]:
        """Return whether one of the node and the prompt's prefix is a prefix of the other."""
        prefix = self.node[prompt]
        # Both agree where they agree at the last level that both reach.
        level = torch.minimum(self.trie.depth_of(prefix), self.trie.depth_of(node))
        last = (level - 1).clamp(min=0)[:, None]
        same = self.trie.path(prefix).gather(1, last) == self.trie.path(node).gather(1, last)
        return same.squeeze(1) | (level == 0)


def make_prefix_mask(trie: Trie, allowed: ItemFilter, num_prompts: int) -> PrefixMask:
    """Make the mask of a filter: a node is dead for a prompt that excludes all its live leaves.

    Counts the excluded leaves below each node, at a cost of a few operations per excluded leaf and
    level that does not depend on the size of the catalog.

    Raises:
        CatalogError: the view belongs to another catalog, an excluded leaf does not exist, or the
            filter is for another number of prompts.
    """
    _check(trie, allowed, num_prompts)
    device = trie.code.device
    view, num_nodes = allowed.view.to(device), trie.num_nodes
    prompt = torch.from_numpy(ragged.row_of(allowed.excluded_start)).to(device)
    node = trie.node_of(torch.from_numpy(allowed.excluded).to(device))  # of each excluded leaf
    # Distinct (prompt, leaf node) pairs of live leaves.
    distinct = torch.unique((prompt * num_nodes + node)[view.live[node]])
    prompt, node = distinct // num_nodes, distinct % num_nodes
    path = torch.cat([torch.full_like(node[:, None], ROOT), trie.path(node)], 1)
    # (prompt, node) of every prefix of an excluded leaf, and its number of excluded leaves.
    key = (prompt[:, None] * num_nodes + path)[path >= 0]
    key, num_excluded = torch.unique(key, return_counts=True)
    below = None
    if allowed.prefix is not None:
        below = _Below(trie=trie, node=torch.from_numpy(allowed.prefix).to(device))
    dead = key[num_excluded == view.num_live(key % num_nodes)]
    return PrefixMask(view=view, dead=dead, excluded=key, num_excluded=num_excluded, below=below)


def _check(trie: Trie, allowed: ItemFilter, num_prompts: int) -> None:
    """Raise CatalogError unless the filter belongs to the trie's catalog and the batch."""
    if allowed.view.catalog != trie.catalog:
        raise CatalogError(
            f"the view was made for catalog {allowed.view.catalog[:12]}, the engine searches "
            f"{trie.catalog[:12]}; make the view again from that catalog"
        )
    if len(allowed.excluded_start) != num_prompts + 1:
        raise CatalogError(
            f"leaves are excluded for {len(allowed.excluded_start) - 1} prompts, the batch has "
            f"{num_prompts}; give one list per prompt, empty where nothing is excluded"
        )
    prefix = allowed.prefix
    if prefix is not None and (
        len(prefix) != num_prompts or ((prefix < ROOT) | (prefix >= trie.num_nodes)).any()
    ):
        raise CatalogError(
            f"a search of {num_prompts} prompts needs one prefix for each, a trie node from 0 to "
            f"{trie.num_nodes - 1}; look prefixes up in the catalog that is searched"
        )
    outside = (allowed.excluded < 0) | (allowed.excluded >= trie.num_leaves)
    if outside.any():
        raise CatalogError(
            f"leaf {allowed.excluded[outside][0]} is excluded, but the catalog has leaves "
            f"0 to {trie.num_leaves - 1}; look leaves up in that catalog"
        )
