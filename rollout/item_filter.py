"""What a search may find: the live leaves of a view, less a few leaves of each prompt.

The policy is untouched: it stays the softmax over all legal codes of the catalog, and what is
reported are its own log-probabilities. Forbidding only decides which prefixes may be entered.

Shapes:  B prompts   X excluded leaves of all prompts   M nodes asked about   K dead nodes
         R prompts of a part   B1 = B + 1
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
    """A view, and what each prompt is not to be shown again."""

    view: CatalogView
    excluded: Int64[np.ndarray, " X"]
    """Leaves, in any order and repeated at will. A leaf goes with all items that share it."""
    excluded_start: Int64[np.ndarray, " B1"]
    """Those of prompt b are `excluded_start[b] : excluded_start[b + 1]`."""

    def select(self, rows: Int64[np.ndarray, " R"]) -> "ItemFilter":
        """What the given prompts may find, in the order asked for."""
        excluded, start = ragged.take(self.excluded, self.excluded_start, rows)
        return ItemFilter(view=self.view, excluded=excluded, excluded_start=start)


@dataclass(frozen=True, kw_only=True)
class PrefixMask:
    """Which nodes the prompts of one search may enter."""

    view: CatalogView
    dead: Int64[Tensor, " K"]
    """Ascending numbers prompt * N + node of nodes that are live, but not for that prompt."""

    def allows(self, prompt: Int64[Tensor, " M"], node: Int64[Tensor, " M"]) -> Bool[Tensor, " M"]:
        """If a leaf that the prompt may find is at or below the node."""
        live = self.view.live[node]
        if len(self.dead) == 0:
            return live
        key = prompt * len(self.view.live) + node
        place = torch.searchsorted(self.dead, key).clamp(max=len(self.dead) - 1)
        return live & (self.dead[place] != key)


def make_prefix_mask(trie: Trie, allowed: ItemFilter, num_prompts: int) -> PrefixMask:
    """Count the excluded leaves along their paths: where all live leaves are, the node is dead.

    Costs a few operations per excluded leaf and level, however large the catalog.

    Raises:
        CatalogError: the view is of another catalog, an excluded leaf does not exist, or the
            exclusions are not those of as many prompts.
    """
    _check(trie, allowed, num_prompts)
    device = trie.code.device
    view, num_nodes = allowed.view.to(device), trie.num_nodes
    owner = torch.from_numpy(ragged.owners(allowed.excluded_start)).to(device)
    leaf = trie.node_of(torch.from_numpy(allowed.excluded).to(device))
    distinct = torch.unique((owner * num_nodes + leaf)[view.live[leaf]])
    owner, leaf = distinct // num_nodes, distinct % num_nodes
    path = torch.cat([torch.full_like(leaf[:, None], ROOT), trie.path(leaf)], 1)
    key = (owner[:, None] * num_nodes + path)[path >= 0]
    key, excluded = torch.unique(key, return_counts=True)
    return PrefixMask(view=view, dead=key[excluded == view.num_live(key % num_nodes)])


def _check(trie: Trie, allowed: ItemFilter, num_prompts: int) -> None:
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
    outside = (allowed.excluded < 0) | (allowed.excluded >= trie.num_leaves)
    if outside.any():
        raise CatalogError(
            f"leaf {allowed.excluded[outside][0]} is to be excluded from a catalog with leaves "
            f"0 to {trie.num_leaves - 1}; look leaves up in that catalog"
        )
