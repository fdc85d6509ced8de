"""Catalog of items: their code sequences, and the trie of all existing sequences.

A sequence is a semantic ID (one code per level), or any token sequence such as a title. Items that
share a sequence share a leaf; a leaf lists its items in catalog order.

Shapes:  I items   D longest sequence   K leaves   K1 = K + 1
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int

from orchard import ragged
from orchard.catalog import codes as tables
from orchard.catalog import embeddings, trie
from orchard.catalog.trie import Trie
from orchard.errors import CatalogError, DataError
from orchard.parquet import read_table

_DIGEST_ROWS = 1 << 20
"""Number of rows that are converted to 64 bits at a time."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Immutable catalog of the items that can be recommended, identified by its `digest`."""

    item_id: Int[np.ndarray, " I"]
    """External identifier of each item; everywhere else an item is identified by its row."""
    codes: Int[np.ndarray, "I D"]
    """Codes of each item, -1 past its end, with the end marker where it was needed."""
    title: tuple[str, ...]
    """Title of each item, empty if unknown."""
    level_size: tuple[int, ...]
    """Number of codes at each level, end markers included."""
    trie: Trie
    leaf_of_item: Int[np.ndarray, " I"]
    """Leaf of each item."""
    item_of_leaf: Int[np.ndarray, " I"]
    """Items grouped by leaf; those of leaf k are `leaf_start[k] : leaf_start[k + 1]`."""
    leaf_start: Int[np.ndarray, " K1"]
    """First entry of each leaf in `item_of_leaf`, then I."""
    end_code: tuple[int, ...]
    """End marker of each level, or -1 if no sequence needs one at that level."""
    code_token: tuple[int, ...]
    """Token ID of each code in title mode (see `titles`), the same at every level; the last entry
    is that of the end marker. Empty for semantic IDs, whose codes have a different meaning per
    level."""
    digest: str
    """SHA-256 of the codes, sizes and identifiers."""

    def __len__(self) -> int:
        return len(self.item_id)

    @property
    def place_in_leaf(self) -> Int[np.ndarray, " I"]:
        """Position of each item among the items of its leaf."""
        position = np.empty(len(self), dtype=np.int64)
        position[self.item_of_leaf] = ragged.index_in_row(self.leaf_start)
        return position

    @property
    def plain_codes(self) -> Int[np.ndarray, "I D"]:
        """Codes of each item, -1 past its end, without end markers."""
        return np.where(self.codes == np.asarray(self.end_code), -1, self.codes)

    @property
    def plain_level_size(self) -> list[int]:
        """Number of codes at each level, without end markers."""
        sizes = zip(self.level_size, self.end_code, strict=True)
        return [size - (end >= 0) for size, end in sizes]

    @property
    def varying_depth(self) -> bool:
        """True if sequences differ in length."""
        return max(self.end_code) >= 0 or bool((self.codes[:, -1] < 0).any())

    @cached_property
    def _order_by_id(self) -> Int[np.ndarray, " I"]:
        """Rows in ascending order of their identifiers."""
        return np.argsort(self.item_id, kind="stable")

    def lookup(
        self, item_id: Int[np.ndarray, " R"]
    ) -> tuple[Int[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
        """Look up the row of each identifier and whether it is in the catalog.

        The row of an identifier that is not in the catalog is arbitrary.
        """
        insertion = np.searchsorted(self.item_id, item_id, sorter=self._order_by_id)
        row = self._order_by_id[insertion.clip(max=len(self) - 1)]
        return row, self.item_id[row] == item_id

    def rows(self, item_id: Int[np.ndarray, " R"]) -> Int[np.ndarray, " R"]:
        """Look up the row of each identifier; raises DataError if one is not in the catalog."""
        row, known = self.lookup(item_id)
        unknown = np.flatnonzero(~known)
        if len(unknown):
            raise DataError(
                f"item {item_id[unknown[0]]} is not in the catalog of {len(self)} items "
                f"({len(unknown)} such references); add it to the items file or drop the rows",
                code="data.unknown_item",
            )
        return row


def from_codes(
    codes: Sequence[Sequence[int]] | Int[np.ndarray, "I D"],
    *,
    item_id: Int[np.ndarray, " I"] | None = None,
    title: Sequence[str] | None = None,
    level_size: Sequence[int] | None = None,
    varying_depth: bool = False,
    code_token: Sequence[int] = (),
) -> Catalog:
    """Create a catalog from the code sequences of its items.

    Args:
        codes: one sequence of non-negative codes per item. An array of any width, with -1 past the
            end of shorter sequences, is used without a loop over items.
        item_id: distinct identifiers; 0, 1, 2, ... by default.
        title: one title per item.
        level_size: codes per level; the largest code in use plus one by default.
        varying_depth: allow sequences of different lengths. Where one is a prefix of another, an
            end marker is appended to it, so that the trie's leaves are exactly the sequences.
        code_token: token ID of each code and, last, of the end marker, if all levels share their
            codes. Every sequence then receives that marker. By default the codes are those of
            semantic IDs.

    Raises:
        CatalogError: no items, an item without codes, wrong depth, a code out of range.
    """
    table, length = tables.pad(codes)
    title_end = len(code_token) - 1  # code of the end marker in title mode
    if code_token:
        table, length = tables.append_end(table, length, title_end)
    table = tables.check(table, length, level_size, varying_depth)
    sizes = list(level_size) if level_size else [int(c) + 1 for c in table.max(0)]
    end_code = [-1] * len(sizes)
    if code_token:
        sizes = [len(code_token)] * len(sizes)
        end_code = [title_end if ends else -1 for ends in (table == title_end).any(0)]
    elif varying_depth:
        table = tables.disambiguate_prefixes(table, sizes, end_code)
    if item_id is None:
        item_id = np.arange(len(table))
    # Sort instead of `np.unique`, whose hash table takes half a gigabyte for ten million integers.
    sorted_id = np.sort(item_id)
    num_repeats = int((sorted_id[1:] == sorted_id[:-1]).sum())
    if num_repeats:
        raise CatalogError(
            f"{len(table)} items carry {len(table) - num_repeats} distinct identifiers; "
            "each item needs one of its own"
        )
    digest = _digest(table, (table.shape, sizes, *code_token), item_id)
    code_trie, leaf_of_item = trie.build(table, catalog=digest)
    return Catalog(
        item_id=np.asarray(item_id, dtype=np.int64),
        codes=table,
        title=tuple(title) if title is not None else ("",) * len(table),
        level_size=tuple(sizes),
        trie=code_trie,
        leaf_of_item=leaf_of_item,
        item_of_leaf=np.argsort(leaf_of_item, kind="stable"),
        leaf_start=ragged.starts(np.bincount(leaf_of_item, minlength=code_trie.num_leaves)),
        end_code=tuple(end_code),
        code_token=tuple(code_token),
        digest=digest,
    )


def read(
    path: Path,
    *,
    level_size: Sequence[int] | None = None,
    varying_depth: bool = False,
    code_token: Sequence[int] = (),
) -> Catalog:
    """Read a catalog from Parquet with the columns `item_id`, `sid` and optionally `title`.

    Raises:
        DataError: the file or a column is missing or unreadable.
        CatalogError: see `from_codes`, or codes without `level_size` leave most tokens unused.
    """
    table = read_table(
        path, role="items", columns=("item_id", "sid"), remedy="data.path and data.items"
    )
    titles = (
        [title or "" for title in table["title"].to_pylist()]
        if "title" in table.column_names
        else None
    )
    ids = table["item_id"].to_numpy().astype(np.int64)
    codes = tables.from_lists(table["sid"], ids)
    if level_size is None and not code_token:
        tables.check_use(codes)
    # Release the Arrow memory, which is as large as the catalog itself for ten million items.
    del table
    pa.default_memory_pool().release_unused()
    return from_codes(
        codes,
        item_id=ids,
        title=titles,
        level_size=level_size,
        varying_depth=varying_depth,
        code_token=code_token,
    )


def write(catalog: Catalog, folder: Path) -> None:
    """Write the catalog into a policy folder, which can then be served on its own (see `load`)."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = catalog.plain_codes
    start = pa.array(ragged.starts((codes >= 0).sum(1)).astype(np.int32))
    sids = pa.ListArray.from_arrays(start, pa.array(codes[codes >= 0].astype(np.int32)))
    table = pa.table(
        {
            "item_id": pa.array(catalog.item_id),
            "title": pa.array(list(catalog.title), pa.string()),
            "sid": sids,
        },
        metadata={
            "level_size": ",".join(str(size) for size in catalog.plain_level_size),
            "varying_depth": str(int(catalog.varying_depth)),
            "code_token": ",".join(str(token) for token in catalog.code_token),
            "digest": catalog.digest,
        },
    )
    pq.write_table(table, folder / "items.parquet", compression="zstd")


def load(folder: Path) -> Catalog:
    """Load a catalog saved by `write`; raises DataError if its content was changed."""
    path = folder / "items.parquet"
    if not path.is_file():
        raise DataError(f"{folder} holds no items.parquet; it is not a saved catalog")
    try:
        schema = pq.read_schema(path)
        metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
        tokens = [int(token) for token in metadata.get("code_token", "").split(",") if token]
        sizes = [int(size) for size in metadata["level_size"].split(",")]
    except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is damaged, or no catalog that was saved: {error}; export the policy again"
        ) from error
    catalog = read(
        path,
        level_size=None if tokens else sizes,
        varying_depth=metadata["varying_depth"] == "1",
        code_token=tokens,
    )
    if catalog.digest != metadata["digest"]:
        raise DataError(f"{path} was changed after it was sealed; export the policy again")
    return catalog


def read_embeddings(
    path: Path, catalog: Catalog, *, items: Path | None = None
) -> Float32[np.ndarray, "I E"]:
    """Read the embedding of each item of the catalog; other items of the file are ignored.

    `items` is the file that the catalog was read from, which records the order of its rows. Raises
    the errors of `orchard.catalog.embeddings.read`.
    """
    remedy = "data.path and data.embeddings"
    return embeddings.read(path, catalog.item_id, remedy=remedy, items=items)


def _digest(
    table: Int[np.ndarray, "I D"], facts: tuple[object, ...], item_id: Int[np.ndarray, " I"]
) -> str:
    """Return the SHA-256 of the shape and sizes, the codes and the identifiers."""
    sha256 = hashlib.sha256(repr(facts).encode())
    for array in (table, item_id):
        for row in range(0, len(array), _DIGEST_ROWS):
            chunk = array[row : row + _DIGEST_ROWS]
            sha256.update(np.ascontiguousarray(chunk, dtype=np.int64).tobytes())
    return sha256.hexdigest()
