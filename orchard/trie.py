"""The trie over all legal code sequences, as arrays (decoding.md calls it an implicit-child CSR).

Nodes are numbered level by level and, within a level, in lexicographic order of their path, so the
children of consecutive nodes are consecutive: `child_start` alone is the whole structure, a child's
id *is* its edge index, and all nodes of one level below a parent form one range.

Shapes:  N nodes   F queried nodes   M children of the queried nodes   K leaves   U sequences
         D longest sequence   F1 = F + 1   D2 = D + 2
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

ROOT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The legal children of some nodes, ragged: those of node f are `start[f] : start[f + 1]`."""

    node: Int[Tensor, " M"]
    owner: Int[Tensor, " M"]
    """Index f of the queried node."""
    start: Int[Tensor, " F1"]


@dataclass(frozen=True, kw_only=True)
class Trie:
    """Every legal sequence of codes is a path from the root to a childless node."""

    code: Int[Tensor, " N"]
    """Code of the edge into each node; -1 at the root."""
    child_start: Int[Tensor, " N+1"]
    """Children of node n are the nodes `child_start[n] : child_start[n + 1]`."""
    level_start: Int[Tensor, " D2"]
    """First node of each depth 0..D, then N."""
    leaf_node: Int[Tensor, " K"]
    """Nodes without children, ascending: leaf k of the catalogue is node `leaf_node[k]`."""

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.code)

    @property
    def num_leaves(self) -> int:
        """Number of distinct sequences."""
        return len(self.leaf_node)

    @cached_property
    def depth(self) -> int:
        """Length of the longest sequence."""
        return len(self.level_start) - 2

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie on another device."""
        return Trie(
            code=self.code.to(device),
            child_start=self.child_start.to(device),
            level_start=self.level_start.to(device),
            leaf_node=self.leaf_node.to(device),
        )

    def num_children(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Number of legal codes after each node; 0 at a leaf."""
        return self.child_start[node + 1] - self.child_start[node]

    def children(self, node: Int[Tensor, " F"]) -> Children:
        """All legal children of each node, in ascending code order."""
        first, count = self.child_start[node], self.num_children(node)
        start = torch.zeros(len(node) + 1, dtype=torch.long, device=node.device)
        torch.cumsum(count, 0, out=start[1:])
        owner = torch.repeat_interleave(torch.arange(len(node), device=node.device), count)
        child = torch.arange(len(owner), device=node.device) + (first - start[:-1])[owner]
        return Children(node=child, owner=owner, start=start)

    def depth_of(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Number of codes on the way to each node."""
        return torch.searchsorted(self.level_start, node, right=True) - 1

    def parent(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """The parent of each node; the root is its own parent."""
        return (torch.searchsorted(self.child_start, node, right=True) - 1).clamp(min=ROOT)

    def leaf(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """The leaf number of nodes that are leaves."""
        return torch.searchsorted(self.leaf_node, node)

    def descend(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Follow forced codes: the first node at or below each that has a choice or is a leaf."""
        while True:
            single = self.num_children(node) == 1
            if not bool(single.any()):
                return node
            node = torch.where(single, self.child_start[node], node)

    def path(self, node: Int[Tensor, " F"]) -> Int[Tensor, "F D"]:
        """The nodes from depth 1 down to each node, -1 past its depth."""
        level = self.depth_of(node)
        table = torch.full((len(node), self.depth), -1, dtype=torch.long, device=node.device)
        for depth in range(self.depth, 0, -1):
            here = level >= depth
            table[:, depth - 1] = torch.where(here, node, table[:, depth - 1])
            node = torch.where(here, self.parent(node), node)
        return table

    def walk(self, codes: Int[Tensor, "F D"]) -> tuple[Int[Tensor, " F"], Bool[Tensor, " F"]]:
        """Follow codes (-1 past the end) from the root: the last node reached, and if all held."""
        node = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        legal = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
        for depth in range(codes.shape[1]):
            low, high, want = self.child_start[node], self.child_start[node + 1], codes[:, depth]
            end, walking = high.clone(), want >= 0
            while bool((low < high).any()):  # lower bound of the code among the sorted children
                middle = (low + high) // 2
                right = (low < high) & (self.code[middle.clamp(max=self.num_nodes - 1)] < want)
                high = torch.where((low < high) & ~right, middle, high)
                low = torch.where(right, middle + 1, low)
            found = (low < end) & (self.code[low.clamp(max=self.num_nodes - 1)] == want)
            legal &= found | ~walking
            node = torch.where(walking & found & legal, low, node)
        return node, legal


def build(codes: Int[np.ndarray, "U D"]) -> tuple[Trie, Int[np.ndarray, " U"]]:
    """The trie of distinct, lexicographically sorted, prefix-free rows, and the leaf of each row.

    `codes` is padded with -1 on the right. Only sorting-type array operations, no loop over rows.
    """
    num_rows, depth = codes.shape
    changed = np.ones((num_rows, depth), dtype=bool)
    if num_rows > 1:
        np.logical_or.accumulate(codes[1:] != codes[:-1], axis=1, out=changed[1:])
    opens = changed & (codes >= 0)  # the row is the first below a new node of that level
    level_start = np.concatenate([[0, 1], 1 + np.cumsum(opens.sum(0))])
    code = np.empty(level_start[-1], dtype=np.int32)
    count = np.zeros(level_start[-1], dtype=np.int64)
    code[0], at = -1, np.zeros(num_rows, dtype=np.int64)
    for level in range(depth):
        new = opens[:, level]
        first = level_start[level + 1]
        code[first : level_start[level + 2]] = codes[new, level]
        count += np.bincount(at[new], minlength=len(count))
        at = np.where(codes[:, level] >= 0, first + np.cumsum(new) - 1, at)
    child_start = np.concatenate([[1], 1 + np.cumsum(count)])
    leaf_node = np.flatnonzero(count == 0)
    trie = Trie(
        code=torch.from_numpy(code),
        child_start=torch.from_numpy(child_start),
        level_start=torch.from_numpy(level_start),
        leaf_node=torch.from_numpy(leaf_node),
    )
    return trie, np.searchsorted(leaf_node, at)
