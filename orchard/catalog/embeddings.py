"""Read and check item embeddings that users provide.

Shapes:  I items   E dimensions
"""

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int, Int64

from orchard.errors import DataError
from orchard.parquet import read_table

EMBEDDINGS = "embeddings.parquet"
"""File beside the items with the embeddings that their semantic IDs were made from."""
MOST = 1e12
"""Largest value, whose squares a sum over many items and dimensions holds in float32."""
_ORDER = b"order_before"
_IDS = ("item_id", "item_ids", "ids", "id")
_VECTORS = ("embedding", "embeddings", "vectors", "arr_0", "weight")


def read(
    path: Path, item_id: Int[np.ndarray, " I"], *, remedy: str, items: Path | None = None
) -> Float32[np.ndarray, "I E"]:
    """Read the embedding of each item from a Parquet, `.npz`, `.pt` or `.npy` file.

    Parquet has the columns `item_id` and `embedding`, `.npz` and `.pt` may hold arrays of these
    names; such files may contain further items. The rows of `.npy`, and of the others without
    identifiers, are those of the items file.

    Args:
        path: path of the file.
        item_id: identifiers of the items, in the order of the returned rows.
        remedy: setting to check if the file is missing, for messages.
        items: the items file, which records whether its rows were put in another order (see
            `record_order`).

    Raises:
        DataError: the file or a column is missing or holds no numbers, an item has no embedding or
            several, lengths differ, values are not finite, or the order of rows is not known.
    """
    if not path.is_file():
        raise DataError(f"embeddings file {path} does not exist; check {remedy}")
    if path.suffix not in _ARRAYS:
        ids, flat = _read_parquet(path, remedy)
    else:
        ids, flat = _ARRAYS[path.suffix](path)
    if ids is None:
        check_embeddings(flat, len(item_id), where=str(path))
        ids = _order_of_rows(flat, np.asarray(item_id), path, items)
    if len(ids) != len(flat):
        raise DataError(
            f"{path} holds {len(ids)} identifiers and {len(flat)} embeddings; give one to each"
        )
    return check_embeddings(flat[_row_of_item(ids, item_id, path)], len(item_id), where=str(path))


def record_order(table: Any, item_id: Int[np.ndarray, " I"]) -> Any:
    """Record in the metadata of a table of items in which order they once were.

    Args:
        table: the items, in an order of their own.
        item_id: their identifiers in the order before; the first order that was recorded stays.
    """
    metadata = dict(table.schema.metadata or {})
    metadata.setdefault(_ORDER, order_digest(item_id).encode())
    return table.replace_schema_metadata(metadata)


def first_order(items: Path) -> Int64[np.ndarray, " I"] | None:
    """Return the identifiers of an items file in the order before it was changed.

    Returns None if the order was not changed, or is not known any more.
    """
    recorded = (pq.read_schema(items).metadata or {}).get(_ORDER)
    beside = items.with_name(EMBEDDINGS)
    if recorded is None or not beside.is_file():
        return None
    ids = pq.read_table(beside, columns=["item_id"])["item_id"].to_numpy()
    return ids if order_digest(ids).encode() == recorded else None


def is_in_first_order(items: Path, item_id: Int[np.ndarray, " I"]) -> bool:
    """Return whether identifiers have the order that the items of a file had before any change."""
    recorded = (pq.read_schema(items).metadata or {}).get(_ORDER)
    return recorded is None or recorded == order_digest(item_id).encode()


def order_digest(item_id: Int[np.ndarray, " I"]) -> str:
    """Return the SHA-256 of identifiers in their order."""
    return hashlib.sha256(np.ascontiguousarray(item_id, dtype=np.int64).tobytes()).hexdigest()


def _order_of_rows(
    flat: np.ndarray, item_id: Int[np.ndarray, " I"], path: Path, items: Path | None
) -> Int[np.ndarray, " I"]:
    """Return the identifier of each row of a file without identifiers.

    Raises:
        DataError: the items were put in another order, and the file is not the one that was used
            before.
    """
    if items is None or not items.is_file():
        return item_id
    current = pq.read_table(items, columns=["item_id"])["item_id"].to_numpy()
    recorded = (pq.read_schema(items).metadata or {}).get(_ORDER)
    if recorded is None or recorded == order_digest(current).encode():
        return current
    before = first_order(items)
    if before is not None:
        _, known = _read_parquet(items.with_name(EMBEDDINGS), "")
        if known.shape == flat.shape and np.array_equal(known, flat.astype(np.float32)):
            return before
    raise DataError(
        f"the rows of {path} have no identifiers, and {items} was put in another order when its "
        "semantic IDs were made; save them with the identifiers: Parquet, or .npz with item_id and "
        "embedding"
    )


def _read_parquet(path: Path, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the identifiers and embeddings of a Parquet file."""
    table = read_table(path, role="embeddings", columns=("item_id", "embedding"), remedy=remedy)
    ids, kind = table["item_id"].to_numpy(), table["embedding"].type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    ):
        raise DataError(f"embeddings of {path} are {kind}; write each as a list of numbers")
    column = table["embedding"].combine_chunks()
    length = column.value_lengths().fill_null(0).to_numpy()
    if len(ids) == 0 or length.min() == 0 or length.min() != length.max():
        raise DataError(
            f"embeddings of {path} have lengths from {min(length, default=0)} to "
            f"{max(length, default=0)}; all items must have one of the same length"
        )
    return ids, column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1)


def check_embeddings(
    embedding: np.ndarray, num_items: int, *, where: str
) -> Float32[np.ndarray, "I E"]:
    """Check embeddings and return them in float32.

    Raises:
        DataError: the number of rows is wrong, or values are not finite numbers.
    """
    if embedding.ndim != 2 or len(embedding) != num_items:
        raise DataError(
            f"{where} holds embeddings of shape {embedding.shape} for {num_items} items; one row "
            "per item is needed"
        )
    kind = embedding.dtype
    if not np.issubdtype(kind, np.floating) and not np.issubdtype(kind, np.integer):
        raise DataError(f"{where} holds embeddings of type {kind}; save real numbers")
    if embedding.shape[1] == 0:
        raise DataError(f"{where} holds embeddings of no dimensions; at least one is needed")
    bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(bad):
        raise DataError(
            f"the embedding of item row {bad[0]} in {where} is not finite ({len(bad)} such items); "
            "compute it again"
        )
    if max(float(embedding.max(initial=0)), -float(embedding.min(initial=0))) > MOST:
        row, column = np.argwhere(np.abs(embedding.astype(np.float64)) > MOST)[0]
        raise DataError(
            f"the embedding of item row {row} in {where} holds {embedding[row, column]:.3g}, "
            f"beyond {MOST:g}, whose squares overflow; scale the embeddings"
        )
    return np.ascontiguousarray(embedding, dtype=np.float32)


def _read_npy(path: Path) -> tuple[None, np.ndarray]:
    """Read the array of an `.npy` file."""
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"embeddings file {path} is not an array of numbers; write it with numpy.save"
        ) from error
    return None, np.asarray(array)


def _read_npz(path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """Read the arrays of an `.npz` file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"embeddings file {path} is not an archive of arrays; write it with numpy.savez"
        ) from error
    return _named(arrays, path)


def _read_pt(path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """Read the tensor, or the tensors by name, of a file of `torch.save`; no code is loaded."""
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling finds
        raise DataError(
            f"embeddings file {path} holds no plain tensors; write it with torch.save of a tensor, "
            "or of a dictionary with item_id and embedding"
        ) from error
    if isinstance(content, torch.Tensor):
        return None, _array(content)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; save a tensor or a dictionary")
    entries: dict[Any, Any] = content
    if entries and all(isinstance(key, int) for key in entries):  # item -> its embedding
        rows = [_array(value) for value in entries.values()]
        if len({row.shape for row in rows}) > 1:
            raise DataError(f"embeddings of {path} differ in length; all items need one length")
        return np.array(list(entries), dtype=np.int64), np.stack(rows)
    return _named({str(name): _array(value) for name, value in entries.items()}, path)


def _array(value: Any) -> np.ndarray:
    """Return a tensor, or a list of numbers, as an array."""
    if hasattr(value, "detach"):
        value = value.detach().to_dense()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _named(arrays: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray | None, np.ndarray]:
    """Choose the identifiers and the embeddings among arrays by name."""
    ids = next((arrays[name] for name in _IDS if name in arrays), None)
    found = [name for name in _VECTORS if name in arrays]
    found = found or [name for name, array in arrays.items() if array.ndim == 2]
    if len(found) != 1:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; name the array of embeddings "
            "`embedding`, and that of identifiers `item_id`"
        )
    if ids is not None and (ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer)):
        raise DataError(f"the identifiers of {path} are {ids.dtype}; save integers, one per item")
    return ids, arrays[found[0]]


_ARRAYS: Mapping[str, Callable[[Path], tuple[np.ndarray | None, np.ndarray]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".pt": _read_pt,
    ".pth": _read_pt,
}
"""Reader of each suffix but Parquet's; it returns identifiers, if there are any, and embeddings."""


def _row_of_item(
    ids: Int[np.ndarray, " N"], item_id: Int[np.ndarray, " I"], path: Path
) -> Int64[np.ndarray, " I"]:
    """Return the row of each item in a file with the identifiers `ids`.

    Raises:
        DataError: an item is missing from the file or has several rows.
    """
    order = np.argsort(ids, kind="stable")
    sorted_ids = ids[order]
    first = np.searchsorted(sorted_ids, item_id)  # first position of each item in sorted order
    row = order[first.clip(max=len(ids) - 1)]
    missing = np.flatnonzero(ids[row] != item_id)
    if len(missing):
        raise DataError(
            f"item {item_id[missing[0]]} has no embedding in {path} ({len(missing)} of "
            f"{len(item_id)} items); add it"
        )
    # Number of rows of each item: the width of its range in sorted order.
    repeated = np.flatnonzero(np.searchsorted(sorted_ids, item_id, side="right") - first > 1)
    if len(repeated):
        raise DataError(
            f"item {item_id[repeated[0]]} has several embeddings in {path} ({len(repeated)} of "
            f"{len(item_id)} items); keep one"
        )
    return row
