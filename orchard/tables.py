"""Reading the Parquet files that users bring."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchard.errors import DataError


def read_table(path: Path, *, role: str, columns: Sequence[str], remedy: str) -> Any:
    """The table of a file that must hold certain columns; it may hold others.

    Args:
        path: of the file.
        role: what the file is, for messages.
        columns: names that must be there.
        remedy: what to check where the file is missing.

    Raises:
        DataError: the file is missing or no Parquet, or lacks a column.
    """
    if not path.is_file():
        raise DataError(f"{role} file {path} does not exist; check {remedy}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{role} file {path} is not readable as Parquet: {error}") from error
    for column in columns:
        if column not in table.column_names:
            raise DataError(
                f"{role} file {path} has columns {', '.join(table.column_names)} but no `{column}`"
            )
    return table
