"""Files of item embeddings that users bring.

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
    """The embedding of each item: from Parquet columns `item_id` and `embedding`, or from `.npy`.

    Parquet may hold further items; rows of `.npy` are those of the items file.

    Args:
        path: of the file.
        item_id: the items, in the order of the rows wanted.
        remedy: what to check where the file is missing.

    Raises:
        DataError: the file or a column is missing or holds no numbers, an item has no embedding or
            two, lengths differ, or values are not finite.
    """
    if path.suffix == ".npy":
        return check_embeddings(_array(path, remedy), len(item_id), where=str(path))
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
    return check_embeddings(flat[_places(ids, item_id, path)], len(item_id), where=str(path))


def check_embeddings(made: np.ndarray, num_items: int, *, where: str) -> Float32[np.ndarray, "I E"]:
    """The embeddings in float32.

    Raises:
        DataError: a wrong number of them, or values that are not finite numbers.
    """
    if made.ndim != 2 or len(made) != num_items:
        raise DataError(
            f"{where} holds embeddings of shape {made.shape} for {num_items} items; one row per "
            "item is needed"
        )
    if not np.issubdtype(made.dtype, np.floating) and not np.issubdtype(made.dtype, np.integer):
        raise DataError(f"{where} holds embeddings of type {made.dtype}; save real numbers")
    bad = np.flatnonzero(~np.isfinite(made).all(axis=1))
    if len(bad):
        raise DataError(
            f"the embedding of item row {bad[0]} in {where} is not finite ({len(bad)} such items); "
            "compute it anew"
        )
    return np.ascontiguousarray(made, dtype=np.float32)


def _array(path: Path, remedy: str) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"embeddings file {path} does not exist; check {remedy}")
    try:
        found: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"embeddings file {path} is no array of numbers; write it with numpy.save"
        ) from error
    return np.asarray(found)


def _places(
    ids: Int[np.ndarray, " N"], item_id: Int[np.ndarray, " I"], path: Path
) -> Int64[np.ndarray, " I"]:
    """Row of each item."""
    order = np.argsort(ids, kind="stable")
    known = ids[order]
    at = np.searchsorted(known, item_id)
    place = order[at.clip(max=len(ids) - 1)]
    missing = np.flatnonzero(ids[place] != item_id)
    if len(missing):
        raise DataError(
            f"item {item_id[missing[0]]} has no embedding in {path} ({len(missing)} of "
            f"{len(item_id)} items); add it"
        )
    twice = np.flatnonzero(np.searchsorted(known, item_id, side="right") - at > 1)
    if len(twice):
        raise DataError(
            f"item {item_id[twice[0]]} has several embeddings in {path} ({len(twice)} of "
            f"{len(item_id)} items); keep one"
        )
    return place
