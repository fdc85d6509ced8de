"""Build and check the code table: one row per item, -1 past its end. No loop over items.

Shapes:  I items   D longest sequence
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from orchard import ragged
from orchard.catalog import trie
from orchard.errors import CatalogError

_OFFSET, _OFFSET_CODES = 16, 16
"""Smallest first code of a level, and number of its codes, that show an offset per level."""
_DEAD_CODES, _DEAD_SHARE = 1 << 16, 4
"""Number of unused codes of a level that is always allowed, and that allowed per code in use."""


def from_lists(column: Any, item_id: Int[np.ndarray, " I"]) -> Int[np.ndarray, "I D"]:
    """Convert a Parquet list column to a code table; zero-copy if it has one chunk and one length.

    Raises:
        CatalogError: the column holds no lists of integers, or an item has no codes or a negative
            code.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.large_list(kind.value_type))
        kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(
        kind.value_type
    ):
        raise CatalogError(f"column `sid` holds {kind}; it must hold lists of integers")
    lists = column.combine_chunks()
    length = lists.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    missing = np.flatnonzero(length == 0)
    if len(missing):
        raise CatalogError(
            f"item {item_id[missing[0]]} has no semantic ID ({len(missing)} of {len(length)} "
            "items); give every item a non-empty `sid` or leave it out of the items file",
            code="catalog.no_sid",
        )
    flat, start = lists.flatten().to_numpy(zero_copy_only=False), ragged.starts(length)
    bad = np.flatnonzero(~(flat >= 0))  # Arrow converts null to NaN, which is caught too
    if len(bad):
        item = item_id[np.searchsorted(start, bad[0], side="right") - 1]
        raise CatalogError(
            f"item {item} has code {flat[bad[0]]:g} in its semantic ID ({len(bad)} such codes); "
            "codes start at 0: give every item one per level"
        )
    depth = int(length.max(initial=0))
    if (length == depth).all():
        return flat.reshape(len(length), depth)
    table = np.full((len(length), depth), -1, dtype=flat.dtype)
    for level in range(depth):
        rows = np.flatnonzero(length > level)  # items that have a code at this level
        table[rows, level] = flat[start[rows] + level]
    return table


def pad(
    codes: Sequence[Sequence[int]] | Int[np.ndarray, "I D"],
) -> tuple[Int[np.ndarray, "I D"], Int[np.ndarray, " I"]]:
    """Return the sequences as a table, -1 past their ends, and the length of each."""
    if len(codes) == 0:
        raise CatalogError("the catalog has no items; at least one is needed")
    if isinstance(codes, np.ndarray):
        # Strip the padding from the right: a sequence ends before its trailing -1 entries.
        length = np.full(len(codes), codes.shape[1])
        for level in reversed(range(codes.shape[1])):
            ended = (length == level + 1) & (codes[:, level] == -1)
            if not ended.any():
                break
            length[ended] = level
        return codes, length
    length = np.fromiter((len(c) for c in codes), dtype=np.int64, count=len(codes))
    flat = np.concatenate([np.asarray(c, dtype=np.int64) for c in codes])
    return ragged.pad(flat, ragged.starts(length), fill=-1), length


def append_end(
    table: Int[np.ndarray, "I D"], length: Int[np.ndarray, " I"], code: int
) -> tuple[Int[np.ndarray, "I D+1"], Int[np.ndarray, " I"]]:
    """Append one code to the end of each sequence."""
    extended = np.pad(table.astype(np.int64), ((0, 0), (0, 1)), constant_values=-1)
    extended[np.arange(len(table)), length] = code
    return extended, length + 1


def check(
    table: Int[np.ndarray, "I D"],
    length: Int[np.ndarray, " I"],
    level_size: Sequence[int] | None,
    varying_depth: bool,
) -> Int[np.ndarray, "I D2"]:
    """Check the codes and return the table with one column per level, in the narrowest type.

    Raises:
        CatalogError: a sequence has the wrong depth, or a code is out of range.
    """
    depth = len(level_size) if level_size else int(length.max())
    wrong = (length > depth) | (length == 0) if varying_depth else length != depth
    if wrong.any():
        row = int(np.argmax(wrong))
        raise CatalogError(
            f"row {row} of the items has a semantic ID of depth {length[row]} where {depth} was "
            f"expected ({int(wrong.sum())} such items); repair it, or set data.varying_depth = "
            "true",
            code="catalog.mixed_depth",
        )
    if table.shape[1] < depth:
        table = np.pad(table, ((0, 0), (0, depth - table.shape[1])), constant_values=-1)
    table = table[:, :depth]
    limit = np.asarray(level_size) if level_size else table.max(0).astype(np.int64) + 1
    present = np.arange(depth) < length[:, None]  # (I, D): the sequence has a code at this level
    bad = present & ((table < 0) | (table >= limit))
    if bad.any():
        row, level = (int(i) for i in np.argwhere(bad)[0])
        raise CatalogError(
            f"row {row} of the items has code {table[row, level]} at level {level + 1}; "
            f"codes there run from 0 to {limit[level] - 1} ({int(bad.any(1).sum())} such items); "
            "correct the items file, or assign new semantic IDs (orchard data sids --overwrite)",
            code="catalog.code_out_of_range",
        )
    # An end marker may still be added to each level.
    return table.astype(trie.code_type(limit))


def check_use(table: Int[np.ndarray, "I D"]) -> None:
    """Raise CatalogError if codes carry an offset per level, or are far apart.

    A level has a token for every code from 0 to its largest, so that each code between that no item
    has is a dead token, with a row of the embedding table.
    """
    previous = -1
    for level in range(table.shape[1]):
        code = table[:, level]
        code = np.sort(code[code >= 0])
        if len(code) == 0:
            return
        used = 1 + int((code[1:] != code[:-1]).sum())
        first, last = int(code[0]), int(code[-1])
        dead = last + 1 - used
        anyway = f"or state data.level_size to have {dead} tokens that no item uses"
        if level and first > previous and first >= _OFFSET and used >= _OFFSET_CODES:
            raise CatalogError(
                f"the codes of level {level + 1} run from {first} to {last}, and those of level "
                f"{level} end at {previous}: they carry an offset per level, but each level counts "
                f"from 0; subtract the offset, {anyway}"
            )
        if dead > max(_DEAD_CODES, _DEAD_SHARE * used):
            raise CatalogError(
                f"level {level + 1} has {used} different codes up to {last}, which leaves {dead} "
                f"tokens unused; number the codes of each level from 0 without gaps, {anyway}"
            )
        previous = last


def disambiguate_prefixes(
    table: Int[np.ndarray, "I D"], sizes: list[int], end_code: list[int]
) -> Int[np.ndarray, "I D"]:
    """Append an end marker to each sequence that is a proper prefix of another.

    Updates `sizes` and `end_code` in place at the levels that receive a marker.
    """
    order, column = trie.sort_rows(table)
    # Each sorted row but the last is compared with its successor.
    differs = (column[:, 1:] != column[:, :-1]).any(0)
    # The padding sorts first, so a prefix of any sequence is a prefix of its successor.
    is_prefix = differs & ((column[:, 1:] == column[:, :-1]) | (column[:, :-1] < 0)).all(0)
    group = np.concatenate([[0], np.cumsum(differs)])  # number of each run of equal sorted rows
    rows = order[np.isin(group, group[:-1][is_prefix])]  # all items whose sequence is a prefix
    if len(rows) == 0:
        return table
    table, end_level = table.copy(), (table[rows] >= 0).sum(1)  # level behind each prefix
    for level in np.unique(end_level):
        end_code[level] = sizes[level]
        sizes[level] += 1
    table[rows, end_level] = np.asarray(end_code)[end_level]
    return table
