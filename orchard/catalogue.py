"""Items, their code sequences, and the trie that says which sequences exist.

A sequence is a semantic ID (one code per level), or any token sequence such as a title. Items that
share a sequence share a leaf; a leaf lists its items in catalogue order.

Shapes:  I items   D longest sequence   K leaves   K1 = K + 1
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int

from orchard import ragged, trie
from orchard.errors import CatalogueError, DataError
from orchard.tables import read_table
from orchard.trie import Trie


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The items that may be recommended. Immutable; `digest` names its content."""

    item_id: Int[np.ndarray, " I"]
    """The user's own identifiers; everywhere else an item is its row here."""
    codes: Int[np.ndarray, "I D"]
    """Codes of each item, -1 past its end, the end marker included where it was needed."""
    title: tuple[str, ...]
    """Empty strings where a title is unknown."""
    level_size: tuple[int, ...]
    """Number of codes at each level, the end marker included."""
    trie: Trie
    leaf_of_item: Int[np.ndarray, " I"]
    item_of_leaf: Int[np.ndarray, " I"]
    """Items grouped by leaf; those of leaf k are `leaf_start[k] : leaf_start[k + 1]`."""
    leaf_start: Int[np.ndarray, " K1"]
    end_code: tuple[int, ...]
    """Per level the code that marks an end, or -1 where no sequence needs one."""
    digest: str

    def __len__(self) -> int:
        return len(self.item_id)

    @property
    def place_in_leaf(self) -> Int[np.ndarray, " I"]:
        """Place of each item among those that share its leaf."""
        place = np.empty(len(self), dtype=np.int64)
        place[self.item_of_leaf] = ragged.places(self.leaf_start)
        return place

    def rows(self, item_id: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
        """Rows of the given identifiers; raises DataError on one that is not in the catalogue."""
        order = np.argsort(self.item_id, kind="stable")
        place = np.searchsorted(self.item_id, item_id, sorter=order).clip(max=len(self) - 1)
        row = order[place]
        unknown = np.flatnonzero(self.item_id[row] != item_id)
        if len(unknown):
            raise DataError(
                f"item {item_id[unknown[0]]} is not in the catalogue of {len(self)} items "
                f"({len(unknown)} such references); add it to the items file or drop the rows"
            )
        return row


def from_codes(
    codes: Sequence[Sequence[int]],
    *,
    item_id: Int[np.ndarray, " I"] | None = None,
    title: Sequence[str] | None = None,
    level_size: Sequence[int] | None = None,
    varying_depth: bool = False,
) -> Catalogue:
    """A catalogue of items given their code sequences.

    Args:
        codes: one sequence of non-negative codes per item.
        item_id: distinct identifiers; 0, 1, 2, ... by default.
        title: one per item.
        level_size: codes per level; the largest code in use plus one by default.
        varying_depth: allow sequences of different lengths. Where one is a prefix of another, an
            end marker is appended to it, so that the trie's leaves are exactly the sequences.

    Raises:
        CatalogueError: no items, an item without codes, wrong depth, a code out of range.
    """
    table = _table(codes, level_size, varying_depth)
    sizes = list(level_size) if level_size else [int(c) + 1 for c in table.max(0)]
    end_code = [-1] * len(sizes)
    if varying_depth:
        table = _mark_ends(table, sizes, end_code)
    unique, inverse = np.unique(table, axis=0, return_inverse=True)
    built, leaf_of_row = trie.build(unique)
    leaf_of_item = leaf_of_row[inverse.reshape(-1)]
    if item_id is None:
        item_id = np.arange(len(table))
    if len(np.unique(item_id)) != len(table):
        raise CatalogueError(
            f"{len(table)} items carry {len(np.unique(item_id))} distinct identifiers; "
            "each item needs one of its own"
        )
    seal = hashlib.sha256(repr((table.shape, sizes)).encode())
    for part in (table, item_id):
        seal.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return Catalogue(
        item_id=np.asarray(item_id, dtype=np.int64),
        codes=table,
        title=tuple(title) if title is not None else ("",) * len(table),
        level_size=tuple(sizes),
        trie=built,
        leaf_of_item=leaf_of_item,
        item_of_leaf=np.argsort(leaf_of_item, kind="stable"),
        leaf_start=ragged.starts(np.bincount(leaf_of_item, minlength=built.num_leaves)),
        end_code=tuple(end_code),
        digest=seal.hexdigest(),
    )


def read(
    path: Path, *, level_size: Sequence[int] | None = None, varying_depth: bool = False
) -> Catalogue:
    """The catalogue of an items file: Parquet columns `item_id`, `sid`, and `title` if known.

    Raises:
        DataError: the file or a column is missing, or unreadable.
        CatalogueError: as `from_codes`.
    """
    table = read_table(
        path, role="items", columns=("item_id", "sid"), remedy="data.path and data.items"
    )
    sids: list[list[int] | None] = table["sid"].to_pylist()
    titles: list[str | None] = (
        table["title"].to_pylist() if "title" in table.column_names else [None] * len(sids)
    )
    ids = table["item_id"].to_numpy().astype(np.int64)
    missing = [i for i, sid in enumerate(sids) if not sid]
    if missing:
        raise CatalogueError(
            f"item {ids[missing[0]]} has no semantic ID ({len(missing)} of {len(sids)} items); "
            "give every item a non-empty `sid` or leave it out of the items file"
        )
    return from_codes(
        [sid or [] for sid in sids],
        item_id=ids,
        title=[title or "" for title in titles],
        level_size=level_size,
        varying_depth=varying_depth,
    )


def write(catalogue: Catalogue, folder: Path) -> None:
    """Save beside a policy, so that the policy can be served on its own (see `load`)."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.asarray(catalogue.end_code)
    codes = [
        [int(c) for level, c in enumerate(row) if c >= 0 and c != ends[level]]
        for row in catalogue.codes
    ]
    table = pa.table(
        {
            "item_id": pa.array(catalogue.item_id),
            "title": pa.array(list(catalogue.title), pa.string()),
            "sid": pa.array(codes, pa.list_(pa.int32())),
        },
        metadata={
            "level_size": ",".join(
                str(size - (end >= 0))
                for size, end in zip(catalogue.level_size, catalogue.end_code, strict=True)
            ),
            "varying_depth": str(int(bool((catalogue.codes < 0).any() or (ends >= 0).any()))),
            "digest": catalogue.digest,
        },
    )
    pq.write_table(table, folder / "items.parquet", compression="zstd")


def load(folder: Path) -> Catalogue:
    """The catalogue that `write` saved; raises DataError where its content was changed."""
    path = folder / "items.parquet"
    if not path.is_file():
        raise DataError(f"{folder} holds no items.parquet; it is not a saved catalogue")
    facts = {k.decode(): v.decode() for k, v in (pq.read_schema(path).metadata or {}).items()}
    catalogue = read(
        path,
        level_size=[int(size) for size in facts["level_size"].split(",")],
        varying_depth=facts["varying_depth"] == "1",
    )
    if catalogue.digest != facts["digest"]:
        raise DataError(f"{path} was changed after it was sealed; export the policy again")
    return catalogue


def read_embeddings(path: Path, catalogue: Catalogue) -> Float32[np.ndarray, "I E"]:
    """The embedding of each item: Parquet columns `item_id` and `embedding`, a list of numbers.

    Items that are not in the catalogue are passed over.

    Raises:
        DataError: the file or a column is missing, an item has no embedding, or lengths differ.
    """
    table = read_table(
        path,
        role="embeddings",
        columns=("item_id", "embedding"),
        remedy="data.path and data.embeddings",
    )
    ids, column = table["item_id"].to_numpy(), table["embedding"].combine_chunks()
    lengths = column.value_lengths().fill_null(0).to_numpy()
    if len(np.unique(lengths)) != 1 or lengths[0] == 0:
        shortest, longest = (f(lengths, initial=lengths.max(initial=0)) for f in (np.min, np.max))
        raise DataError(
            f"embeddings of {path} have lengths from {shortest} to {longest}; all items must have "
            "one of the same length"
        )
    order = np.argsort(ids, kind="stable")
    place = order[np.searchsorted(ids, catalogue.item_id, sorter=order).clip(max=len(ids) - 1)]
    missing = np.flatnonzero(ids[place] != catalogue.item_id)
    if len(missing):
        raise DataError(
            f"item {catalogue.item_id[missing[0]]} has no embedding in {path} ({len(missing)} of "
            f"{len(catalogue)} items); add it, or leave data.embeddings out"
        )
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(ids), -1)[place].astype(np.float32)


def _table(
    codes: Sequence[Sequence[int]], level_size: Sequence[int] | None, varying_depth: bool
) -> Int[np.ndarray, "I D"]:
    """The sequences as a padded table, checked."""
    if len(codes) == 0:
        raise CatalogueError("the catalogue has no items; at least one is needed")
    length = np.fromiter((len(c) for c in codes), dtype=np.int64, count=len(codes))
    depth = len(level_size) if level_size else int(length.max())
    wrong = (length > depth) | (length == 0) if varying_depth else length != depth
    if wrong.any():
        row = int(np.argmax(wrong))
        raise CatalogueError(
            f"row {row} of the items has a semantic ID of depth {length[row]} where {depth} was "
            f"expected ({int(wrong.sum())} such items); repair it, or set data.varying_depth = true"
        )
    flat = np.concatenate([np.asarray(c, dtype=np.int64) for c in codes])
    table = ragged.pad(flat, ragged.starts(length), fill=-1, width=depth)
    limit = np.asarray(level_size) if level_size else table.max(0) + 1
    inside = np.arange(depth) < length[:, None]
    bad = inside & ((table < 0) | (table >= limit))
    if bad.any():
        row, level = (int(i) for i in np.argwhere(bad)[0])
        raise CatalogueError(
            f"row {row} of the items has code {table[row, level]} at level {level + 1}; "
            f"codes there run from 0 to {limit[level] - 1} ({int(bad.any(1).sum())} such items)"
        )
    return table


def _mark_ends(
    table: Int[np.ndarray, "I D"], sizes: list[int], end_code: list[int]
) -> Int[np.ndarray, "I D"]:
    """Append the end marker to each sequence that is a proper prefix of another."""
    unique, inverse = np.unique(table, axis=0, return_inverse=True)
    # Sorted with the padding smallest, a prefix of anything is a prefix of its successor.
    same = (unique[:-1] == unique[1:]) | (unique[:-1] < 0)
    rows = np.flatnonzero(same.all(1))
    if len(rows) == 0:
        return table
    level = (unique[rows] >= 0).sum(1)
    for at in np.unique(level):
        end_code[at] = sizes[at]
        sizes[at] += 1
    unique[rows, level] = np.asarray(end_code)[level]
    return unique[inverse.reshape(-1)]
