"""Read and check the Parquet files that users provide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchard.errors import DataError

_INTEGERS, _LISTS = ("item_id", "target"), ("history",)
"""Names of the columns that must hold integers, and lists of integers, in every file."""


def read_table(path: Path, *, role: str, columns: Sequence[str], remedy: str) -> Any:
    """Read a Parquet file and check that it has the required columns; it may have others.

    Args:
        path: path of the file.
        role: role of the file, for messages.
        columns: names of the required columns.
        remedy: setting to check if the file is missing, for messages.

    Raises:
        DataError: the file is missing or no Parquet, lacks a column, or a column of items has
            another type or missing values.
    """
    if not path.is_file():
        raise DataError(f"{role} file {path} does not exist; check {remedy}", code="data.no_file")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{role} file {path} is not readable as Parquet: {error}; write it again",
            code="data.unreadable",
        ) from error
    for column in columns:
        if column not in table.column_names:
            raise DataError(
                f"{role} file {path} has columns {', '.join(table.column_names)} but no "
                f"`{column}`; add it, or rename the one that is meant",
                code="data.no_column",
            )
        table = _with_plain_lists(table, column)
        _check(table[column], column, f"{role} file {path}")
    return table


def _with_plain_lists(table: Any, name: str) -> Any:
    """Return the table with lists of a fixed size, and views of lists, as lists."""
    kind = table[name].type
    if not (
        pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    ):
        return table
    column = table[name].cast(pa.large_list(kind.value_type))
    return table.set_column(table.column_names.index(name), name, column)


def _check(column: Any, name: str, where: str) -> None:
    """Raise DataError if a column of items has the wrong type or missing values."""
    kind = column.type
    if name in _INTEGERS:
        if not pa.types.is_integer(kind):
            raise DataError(
                f"column `{name}` of {where} holds {kind}; it must hold integers",
                code="data.wrong_type",
            )
        if column.null_count:
            row = column.is_null().index(pa.scalar(True)).as_py()
            raise DataError(
                f"row {row} of {where} has no `{name}` ({column.null_count} such rows); fill it in "
                "or drop the row",
                code="data.missing_value",
            )
    if name in _LISTS:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not is_list or not pa.types.is_integer(kind.value_type):
            raise DataError(
                f"column `{name}` of {where} holds {kind}; it must hold lists of integers",
                code="data.wrong_type",
            )
        lists = column.combine_chunks()
        if not isinstance(lists, pa.ChunkedArray) and lists.flatten().null_count:
            length = lists.value_lengths().fill_null(0).to_numpy()
            missing = lists.flatten().is_null().to_numpy(zero_copy_only=False)
            rows = np.unique(np.repeat(np.arange(len(length)), length)[missing])
            raise DataError(
                f"row {rows[0]} of {where} has a missing item in `{name}` ({len(rows)} such rows); "
                "leave missing items out of the list"
            )
