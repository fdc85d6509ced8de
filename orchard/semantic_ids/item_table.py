"""Items of a tokenizer bundle with their semantic IDs, and the files that hold them.

Shapes:  I items   R looked-up items   L levels of the quantizer   M levels of the semantic IDs
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from blake3 import blake3
from jaxtyping import Bool, Float32, Float64, Int, Int64

from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemTable:
    """Items in the order in which they were assigned."""

    item_id: Int64[np.ndarray, " I"]
    quantized: Int64[np.ndarray, "I L"]
    """Codes of the quantizer, before collisions."""
    sid: Int64[np.ndarray, "I M"]
    """Semantic IDs."""
    prior: Float64[np.ndarray, " I"]
    """Times that an item was a target when the bundle was made; 0 for later items."""
    distance: Float32[np.ndarray, " I"]
    """Squared distance to the assigned code of the last codebook."""
    nearest: Float32[np.ndarray, " I"]
    """Squared distance to the code of the quantizer."""
    version: Int64[np.ndarray, " I"]
    """Version of the bundle that an item came with."""

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.item_id)

    @cached_property
    def _order(self) -> Int64[np.ndarray, " I"]:
        return np.argsort(self.item_id, kind="stable")

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the item identifiers in ascending order, and of their semantic IDs."""
        return digest_of(self.item_id, self.sid)

    def lookup(
        self, item_id: Int[np.ndarray, " R"]
    ) -> tuple[Int64[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
        """Return the row of each item, and whether it is in the table."""
        ids = self.item_id[self._order]
        row = self._order[np.searchsorted(ids, item_id).clip(max=len(ids) - 1)]
        return row, self.item_id[row] == item_id

    def take(self, rows: Int[np.ndarray, " R"] | Bool[np.ndarray, " I"]) -> "ItemTable":
        """Return some of the items."""
        return ItemTable(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def write(self, path: Path) -> None:
        """Write the items to a Parquet file."""
        columns: dict[str, Any] = {}
        for field in fields(self):
            array = getattr(self, field.name)
            columns[field.name] = _lists(array) if array.ndim == 2 else pa.array(array)
        pq.write_table(pa.table(columns), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "ItemTable":
        """Read the items of a Parquet file that `write` wrote.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            table = pq.read_table(path)
            return cls(
                item_id=table["item_id"].to_numpy(),
                quantized=_table(table["quantized"]),
                sid=_table(table["sid"]),
                prior=table["prior"].to_numpy(),
                distance=table["distance"].to_numpy(),
                nearest=table["nearest"].to_numpy(),
                version=table["version"].to_numpy(),
            )
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise DataError(f"{path} is damaged: {error}; copy the bundle again") from error


def digest_of(item_id: Int[np.ndarray, " I"], sid: Int[np.ndarray, "I M"]) -> str:
    """Return the BLAKE3 of item identifiers in ascending order, and of their semantic IDs."""
    order = np.argsort(item_id, kind="stable")
    hasher = blake3(np.ascontiguousarray(item_id[order], dtype=np.int64).tobytes())
    hasher.update(np.ascontiguousarray(sid[order], dtype=np.int64).tobytes())
    return hasher.hexdigest()


def concatenated(parts: Sequence[ItemTable]) -> ItemTable:
    """Return the items of all parts, in order."""
    return ItemTable(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(ItemTable)
        }
    )


def sid_column(sid: Int[np.ndarray, "I M"]) -> Any:
    """Return semantic IDs as a column of an items file."""
    return _lists(sid)


def sid_text_column(sid: Int[np.ndarray, "I M"]) -> Any:
    """Return semantic IDs as a column of texts such as `<a_3><b_17>`."""
    parts: list[Any] = []
    for level, column in enumerate(sid.T):
        before = "<" if level == 0 else "><"
        parts += [f"{before}{chr(97 + level)}_", pc.cast(pa.array(column), pa.string())]
    return pc.binary_join_element_wise(*parts, ">", "")


def _lists(table: Int[np.ndarray, "I M"]) -> Any:
    """Return a table of codes as a column of lists."""
    flat = pa.array(table.reshape(-1).astype(np.int32))
    return pa.FixedSizeListArray.from_arrays(flat, table.shape[1]).cast(pa.list_(pa.int32()))


def _table(column: Any) -> Int64[np.ndarray, "I M"]:
    """Return a column of lists of one length as a table of codes."""
    flat = column.combine_chunks().flatten().to_numpy().astype(np.int64)
    return flat.reshape(len(column), -1)
