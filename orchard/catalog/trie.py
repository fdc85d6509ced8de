"""The trie over all legal code sequences, as arrays.

Nodes are numbered level by level and, within a level, in lexicographic order of their path, so the
children of consecutive nodes are consecutive: `child_start` alone is the whole structure, a child's
id *is* its edge index, and all nodes of one level below a parent form one range. Nothing is stored
twice: nodes of the last level have no children and are leaves, so neither is written down. Ten
million sequences of three codes out of 8192 take some 76 MB.

Shapes:  N nodes   P nodes above the last level   E leaves among them   K leaves   I rows
         D longest sequence   F queried nodes   M children of them   P1 = P + 1   F1 = F + 1
         D2 = D + 2
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

ROOT = 0
_KEY_BITS = 63
"""Bits of a non-negative int64, into which a row and its number are packed for sorting."""


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
    """Code of the edge into each node; -1 at the root. 16 bits wide where the codes fit."""
    child_start: Int[Tensor, " P1"]
    """Children of node n are the nodes `child_start[n] : child_start[n + 1]`; 32 bits wide where
    the nodes can be counted so. Only for nodes above the last level: see `first_child`."""
    level_start: Int[Tensor, " D2"]
    """First node of each depth 0..D, then N."""
    early_leaf: Int[Tensor, " E"]
    """Nodes without children above the last level, ascending."""
    catalog: str
    """Digest of the catalog whose sequences these are."""

    @cached_property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.code)

    @cached_property
    def num_inner(self) -> int:
        """Number of nodes above the last level."""
        return len(self.child_start) - 1

    @property
    def num_leaves(self) -> int:
        """Number of distinct sequences."""
        return len(self.early_leaf) + self.num_nodes - self.num_inner

    @property
    def leaf_node(self) -> Int[Tensor, " K"]:
        """The node of every leaf, ascending."""
        return self.node_of(torch.arange(self.num_leaves, device=self.code.device))

    @cached_property
    def depth(self) -> int:
        """Length of the longest sequence."""
        return len(self.level_start) - 2

    def to(self, device: torch.device | str) -> "Trie":
        """The same trie on another device."""
        return replace(
            self,
            code=self.code.to(device),
            child_start=self.child_start.to(device),
            level_start=self.level_start.to(device),
            early_leaf=self.early_leaf.to(device),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as NumPy arrays, which Ray's object store maps instead of copying.

        All actors of a machine that receive the same reference share one copy.
        """
        tensors = (self.code, self.child_start, self.level_start, self.early_leaf)
        return _from_arrays, (*(tensor.cpu().numpy() for tensor in tensors), self.catalog)

    def first_child(self, node: Int[Tensor, "... F"]) -> Int[Tensor, "... F"]:
        """The first child of each node; where it has none, the node at which one would be put."""
        return self.child_start[node.clamp(max=self.num_inner)].long()

    def num_children(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Number of legal codes after each node; 0 at a leaf."""
        first, end = self._child_range(node)
        return end - first

    def _child_range(self, node: Int[Tensor, " F"]) -> Int[Tensor, "2 F"]:
        """The first child of each node, and of the node after it."""
        return self.first_child(torch.stack((node, node + 1)))

    def children(self, node: Int[Tensor, " F"]) -> Children:
        """All legal children of each node, in ascending code order."""
        first, end = self._child_range(node)
        count = end - first
        start = torch.zeros(len(node) + 1, dtype=torch.long, device=node.device)
        torch.cumsum(count, 0, out=start[1:])
        owner = torch.repeat_interleave(count)
        child = torch.arange(len(owner), device=node.device)
        child += (first - start[:-1]).index_select(0, owner)
        return Children(node=child, owner=owner, start=start)

    def depth_of(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Number of codes on the way to each node."""
        return torch.searchsorted(self.level_start, node, right=True) - 1

    def parent(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """The parent of each node; the root is its own parent."""
        place = torch.searchsorted(self.child_start, node.to(self.child_start.dtype), right=True)
        return (place - 1).clamp(min=ROOT)

    def leaf(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """The leaf number of nodes that are leaves."""
        early = torch.searchsorted(self.early_leaf, node)
        return torch.where(
            node < self.num_inner, early, node - self.num_inner + len(self.early_leaf)
        )

    def node_of(self, leaf: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """The node of each leaf number."""
        late = leaf - len(self.early_leaf) + self.num_inner
        if len(self.early_leaf) == 0:
            return late
        early = self.early_leaf[leaf.clamp(max=len(self.early_leaf) - 1)]
        return torch.where(leaf < len(self.early_leaf), early, late)

    def descend(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Follow forced codes: the first node at or below each that has a choice or is a leaf."""
        while True:
            single = self.num_children(node) == 1
            if not bool(single.any()):
                return node
            node = torch.where(single, self.first_child(node), node)

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
            low, high, want = self.first_child(node), self.first_child(node + 1), codes[:, depth]
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


def _from_arrays(*parts: Any) -> Trie:
    """Rebuild a pickled trie around its arrays, read-only where they are mapped."""
    *arrays, catalog = parts
    with warnings.catch_warnings():
        # Nothing writes to a trie, so that a tensor on read-only memory is safe.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        code, child_start, level_start, early_leaf = map(torch.from_numpy, arrays)
    return Trie(
        code=code, child_start=child_start, level_start=level_start, early_leaf=early_leaf,
        catalog=catalog,
    )  # fmt: skip


def build(codes: Int[np.ndarray, "I D"], *, catalog: str) -> tuple[Trie, Int[np.ndarray, " I"]]:
    """The trie of the rows, in any order and repeated at will, and the leaf of each row.

    Rows are padded with -1 on the right, and none is a proper prefix of another. There is no loop
    over rows: one sort, then per level a comparison of neighbours and a cumulative sum.
    """
    order, column = sort_rows(codes)
    num_rows, depth = codes.shape
    offset = offset_type(codes.size + 1)
    changed = np.zeros(num_rows, dtype=bool)  # the row differs from the one before, so far
    changed[0] = True
    opens = np.zeros(1, dtype=np.int64)  # the first row below each node of the level above
    level_start, code = [0, 1], [np.full(1, -1, codes.dtype)]
    child_start: list[Int[np.ndarray, " _"]] = []
    early: list[Int[np.ndarray, " _"]] = []
    for level, here in enumerate(column):
        changed[1:] |= here[1:] != here[:-1]
        new, first = changed & (here >= 0), level_start[-1]
        # A node's children are opened from its own first row on, up to that of the next node.
        before = np.cumsum(new, dtype=offset) - new
        child_start.append(first + before[opens])
        opens = np.flatnonzero(new)
        code.append(here[opens])
        level_start.append(first + len(opens))
        if level + 1 < depth:
            early.append(first + np.flatnonzero(column[level + 1][opens] < 0))
    child_start.append(np.array([level_start[-1]]))
    narrow = offset_type(level_start[-1])
    trie = Trie(
        code=torch.from_numpy(np.concatenate(code).astype(code_type(codes), copy=False)),
        child_start=torch.from_numpy(np.concatenate([s.astype(narrow) for s in child_start])),
        level_start=torch.tensor(level_start),
        early_leaf=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *early])),
        catalog=catalog,
    )
    return trie, _leaf_of_row(order, column, changed)


def sort_rows(
    codes: Int[np.ndarray, "I D"],
) -> tuple[Int[np.ndarray, " I"], Int[np.ndarray, "D I"]]:
    """The stable lexicographic order of the rows, and the columns in that order."""
    num_rows, depth = codes.shape
    bits = [(int(top) + 1).bit_length() for top in codes.max(0)]  # codes from -1 up, shifted to 0
    row_bits = num_rows.bit_length()
    if sum(bits) + row_bits > _KEY_BITS:
        order = np.lexsort(codes.T[::-1])
        return order, np.ascontiguousarray(codes[order].T)
    # Sorting plain integers that carry their row is some twenty times faster than sorting indices,
    # and the columns are read off in order instead of being gathered.
    key = np.zeros(num_rows, dtype=np.int64)
    for level, width in enumerate(bits):
        key = (key << width) + codes[:, level] + 1
    key = (key << row_bits) | np.arange(num_rows)
    key.sort()
    order = key & ((1 << row_bits) - 1)
    key >>= row_bits
    column = np.empty((depth, num_rows), dtype=codes.dtype)
    for level, width in reversed(list(enumerate(bits))):
        column[level] = (key & ((1 << width) - 1)) - 1
        key >>= width
    return order, column


def code_type(codes: Int[np.ndarray, "..."]) -> type[np.int16] | type[np.int32]:
    """The narrowest type for codes: 16 bits up to 32767."""
    return np.int16 if codes.max(initial=0) <= np.iinfo(np.int16).max else np.int32


def offset_type(num_nodes: int) -> type[np.int32] | type[np.int64]:
    """The narrowest type that counts so many nodes."""
    return np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64


def _leaf_of_row(
    order: Int[np.ndarray, " I"], column: Int[np.ndarray, "D I"], distinct: Bool[np.ndarray, " I"]
) -> Int[np.ndarray, " I"]:
    """The leaf of every row, given the sorted table; leaves count by depth, then by path."""
    leaf = np.empty(len(order), dtype=np.int64)
    place = np.cumsum(distinct)
    place -= 1
    if column[-1].min() >= 0:  # all of one depth: the order of the paths is that of the leaves
        leaf[order] = place
        return leaf
    number = np.empty(int(distinct.sum()), dtype=np.int64)
    length = (column >= 0).sum(0)[distinct]
    number[np.argsort(length, kind="stable")] = np.arange(len(number))
    leaf[order] = number[place]
    return leaf
