"""Trie over all legal code sequences, stored as arrays.

Nodes are numbered level by level and, within a level, in lexicographic order of their path, so the
children of consecutive nodes are consecutive: `child_start` alone defines the structure, the index
of a child *is* its edge index, and all nodes of one level below a parent form one range. Nothing is
stored twice: nodes of the last level are leaves without children, so neither fact is stored. Ten
million sequences of three codes out of 8192 take about 76 MB.

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
"""Index of the root node."""
_KEY_BITS = 63
"""Number of bits of a non-negative int64, into which a row and its index are packed for sorting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """Legal children of queried nodes, ragged: those of node f are `start[f] : start[f + 1]`."""

    node: Int[Tensor, " M"]
    """Trie node of each child."""
    owner: Int[Tensor, " M"]
    """Index f of the queried node."""
    start: Int[Tensor, " F1"]
    """First child of each queried node, then M."""


@dataclass(frozen=True, kw_only=True)
class Trie:
    """Trie whose paths from the root to childless nodes are the legal code sequences."""

    code: Int[Tensor, " N"]
    """Code of the edge into each node; -1 at the root. 16 bits wide where the codes fit."""
    child_start: Int[Tensor, " P1"]
    """Children of node n are the nodes `child_start[n] : child_start[n + 1]`; 32 bits wide if the
    number of nodes allows it. Only for nodes above the last level, see `first_child`."""
    level_start: Int[Tensor, " D2"]
    """First node of each depth 0..D, then N."""
    early_leaf: Int[Tensor, " E"]
    """Nodes without children above the last level, ascending."""
    catalog: str
    """Digest of the catalog of these sequences."""

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
        """Node of every leaf, ascending."""
        return self.node_of(torch.arange(self.num_leaves, device=self.code.device))

    @cached_property
    def depth(self) -> int:
        """Length of the longest sequence."""
        return len(self.level_start) - 2

    def to(self, device: torch.device | str) -> "Trie":
        """Return the same trie on another device."""
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
        """Return the first child of each node, or the node index at which it would be inserted."""
        return self.child_start[node.clamp(max=self.num_inner)].long()

    def num_children(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Count the legal codes after each node; 0 at a leaf."""
        first, end = self._child_range(node)
        return end - first

    def _child_range(self, node: Int[Tensor, " F"]) -> Int[Tensor, "2 F"]:
        """Return the first child of each node and of its successor: the bounds of its children."""
        return self.first_child(torch.stack((node, node + 1)))

    def children(self, node: Int[Tensor, " F"]) -> Children:
        """Return all legal children of each node, in ascending code order."""
        first, end = self._child_range(node)
        count = end - first
        start = torch.zeros(len(node) + 1, dtype=torch.long, device=node.device)
        torch.cumsum(count, 0, out=start[1:])
        owner = torch.repeat_interleave(count)  # index f of the queried node, for each child
        child = torch.arange(len(owner), device=node.device)
        child += (first - start[:-1]).index_select(0, owner)
        return Children(node=child, owner=owner, start=start)

    def depth_of(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Return the depth of each node: the number of codes on its path."""
        return torch.searchsorted(self.level_start, node, right=True) - 1

    def parent(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Return the parent of each node; the root is its own parent."""
        insertion = torch.searchsorted(
            self.child_start, node.to(self.child_start.dtype), right=True
        )
        return (insertion - 1).clamp(min=ROOT)

    def leaf(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Return the leaf index of nodes that are leaves."""
        early = torch.searchsorted(self.early_leaf, node)
        return torch.where(
            node < self.num_inner, early, node - self.num_inner + len(self.early_leaf)
        )

    def node_of(self, leaf: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Return the node of each leaf index."""
        late = leaf - len(self.early_leaf) + self.num_inner
        if len(self.early_leaf) == 0:
            return late
        early = self.early_leaf[leaf.clamp(max=len(self.early_leaf) - 1)]
        return torch.where(leaf < len(self.early_leaf), early, late)

    def descend(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Follow forced codes down to the first node that has a choice or is a leaf."""
        while True:
            single = self.num_children(node) == 1
            if not bool(single.any()):
                return node
            node = torch.where(single, self.first_child(node), node)

    def leaves_below(self, node: Int[Tensor, " F"]) -> Int[Tensor, " F"]:
        """Count the leaves at or below each node."""
        low, high = node, node + 1
        number = torch.zeros_like(node)
        # Nodes at or below a node, level by level, are consecutive: from `low` to `high` - 1.
        for _ in range(self.depth):
            first, end = torch.searchsorted(self.early_leaf, torch.stack((low, high)))
            is_inner = low < self.num_inner
            number = number + torch.where(is_inner, end - first, 0)
            low = torch.where(is_inner, self.first_child(low), low)
            high = torch.where(is_inner, self.first_child(high), high)
        return number + high - low

    def path(self, node: Int[Tensor, " F"]) -> Int[Tensor, "F D"]:
        """Return the nodes from depth 1 down to each node, -1 past its depth."""
        level = self.depth_of(node)
        table = torch.full((len(node), self.depth), -1, dtype=torch.long, device=node.device)
        for depth in range(self.depth, 0, -1):
            reached = level >= depth  # nodes whose path has a node at this depth
            table[:, depth - 1] = torch.where(reached, node, table[:, depth - 1])
            node = torch.where(reached, self.parent(node), node)
        return table


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
    """Build the trie of the rows, and return it with the leaf of each row.

    Rows may repeat and have any order. They are padded with -1 on the right, and no row is a proper
    prefix of another. There is no loop over rows: one sort, then for each level a comparison of
    neighboring rows and a cumulative sum.
    """
    order, column = sort_rows(codes)
    num_rows, depth = codes.shape
    offset_dtype = offset_type(codes.size + 1)
    # (I): the sorted row differs from its predecessor in the levels so far
    changed = np.zeros(num_rows, dtype=bool)
    changed[0] = True
    first_row = np.zeros(1, dtype=np.int64)  # first sorted row of each node of the level above
    level_start, code = [0, 1], [np.full(1, -1, codes.dtype)]
    child_start: list[Int[np.ndarray, " _"]] = []
    early: list[Int[np.ndarray, " _"]] = []
    for level, level_code in enumerate(column):
        changed[1:] |= level_code[1:] != level_code[:-1]
        # (I): the sorted row is the first of a node of this level
        opens_node, first_node = changed & (level_code >= 0), level_start[-1]
        # Number of nodes of this level that preceding rows opened. The children of a node are those
        # opened from its first row up to the first row of the next node.
        opened_before = np.cumsum(opens_node, dtype=offset_dtype) - opens_node
        child_start.append(first_node + opened_before[first_row])
        first_row = np.flatnonzero(opens_node)
        code.append(level_code[first_row])
        level_start.append(first_node + len(first_row))
        if level + 1 < depth:
            early.append(first_node + np.flatnonzero(column[level + 1][first_row] < 0))
    child_start.append(np.array([level_start[-1]]))
    node_dtype = offset_type(level_start[-1])
    trie = Trie(
        code=torch.from_numpy(np.concatenate(code).astype(code_type(codes), copy=False)),
        child_start=torch.from_numpy(np.concatenate([s.astype(node_dtype) for s in child_start])),
        level_start=torch.tensor(level_start),
        early_leaf=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *early])),
        catalog=catalog,
    )
    return trie, _leaf_of_row(order, column, changed)


def sort_rows(
    codes: Int[np.ndarray, "I D"],
) -> tuple[Int[np.ndarray, " I"], Int[np.ndarray, "D I"]]:
    """Return the stable lexicographic order of the rows, and the columns in that order."""
    num_rows, depth = codes.shape
    bits = [(int(top) + 1).bit_length() for top in codes.max(0)]  # codes from -1 up, shifted to 0
    row_bits = num_rows.bit_length()
    if sum(bits) + row_bits > _KEY_BITS:
        order = np.lexsort(codes.T[::-1])
        return order, np.ascontiguousarray(codes[order].T)
    # Each key packs the codes of a row and its index. Sorting plain integers is about twenty times
    # faster than sorting indices, and the columns are unpacked in order instead of gathered.
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
    """Return the narrowest type for codes: 16 bits up to 32767."""
    return np.int16 if codes.max(initial=0) <= np.iinfo(np.int16).max else np.int32


def offset_type(num_nodes: int) -> type[np.int32] | type[np.int64]:
    """Return the narrowest type that can count the nodes."""
    return np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64


def _leaf_of_row(
    order: Int[np.ndarray, " I"], column: Int[np.ndarray, "D I"], distinct: Bool[np.ndarray, " I"]
) -> Int[np.ndarray, " I"]:
    """Return the leaf of every row from the sorted table; leaves are ordered by depth, then path.

    Args:
        order: row of each sorted row.
        column: codes of the sorted rows, level by level.
        distinct: true for each sorted row that differs from its predecessor.
    """
    leaf = np.empty(len(order), dtype=np.int64)
    path_index = np.cumsum(distinct)  # index of the distinct path of each sorted row
    path_index -= 1
    if column[-1].min() >= 0:  # all paths have the same depth: leaves are ordered like paths
        leaf[order] = path_index
        return leaf
    leaf_of_path = np.empty(int(distinct.sum()), dtype=np.int64)
    length = (column >= 0).sum(0)[distinct]
    leaf_of_path[np.argsort(length, kind="stable")] = np.arange(len(leaf_of_path))
    leaf[order] = leaf_of_path[path_index]
    return leaf
