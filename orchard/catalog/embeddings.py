"""Read and check item embeddings that users provide.

Shapes:  I items   E dimensions
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, Int64

from orchard.errors import DataError
from orchard.parquet import read_table


def read(path: Path, item_id: Int[np.ndarray, " I"], *, remedy: str) -> Float32[np.ndarray, "I E"]:
    """Read the embedding of each item from a Parquet or `.npy` file.

    Parquet has the columns `item_id` and `embedding` and may contain further items; the rows of
    `.npy` are those of the items file.

    Args:
        path: path of the file.
        item_id: identifiers of the items, in the order of the returned rows.
        remedy: setting to check if the file is missing, for messages.

    Raises:
        DataError: the file or a column is missing or holds no numbers, an item has no embedding or
            several, lengths differ, or values are not finite.
    """
    if path.suffix == ".npy":
        return check_embeddings(_read_npy(path, remedy), len(item_id), where=str(path))
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
    flat = column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), -1)
    return check_embeddings(flat[_row_of_item(ids, item_id, path)], len(item_id), where=str(path))


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
    bad = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(bad):
        raise DataError(
            f"the embedding of item row {bad[0]} in {where} is not finite ({len(bad)} such items); "
            "compute it anew"
        )
    return np.ascontiguousarray(embedding, dtype=np.float32)


def _read_npy(path: Path, remedy: str) -> np.ndarray:
    """Read the array of an `.npy` file."""
    if not path.is_file():
        raise DataError(f"embeddings file {path} does not exist; check {remedy}")
    try:
        array: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"embeddings file {path} is no array of numbers; write it with numpy.save"
        ) from error
    return np.asarray(array)


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
