"""Read columns of Parquet files; identifiers become dictionary-encoded text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from orchard.data.importers.tables.source import Tick, refuse_type
from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers


def schema_of(path: Path) -> Any:
    """Return the schema of a file; raises DataError if it is no Parquet."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}; write it again") from error


def read(file: Path, names: Sequence[str], encoded: Sequence[str], first: Path, tick: Tick) -> Any:
    """Read the named columns of a file, those in `encoded` as identifiers; raises DataError."""
    schema = schema_of(file)
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise DataError(f"{file} lacks columns of {first.name}; all parts need {', '.join(names)}")
    try:
        table = pq.read_table(file, columns=list(names)).select(list(names))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is not readable as Parquet: {error}; write it again") from error
    tick(file.stat().st_size)
    columns = {
        name: _id_text(table[name], name, file)
        if name in encoded
        else _single(table[name], name, file)
        for name in names
    }
    return pa.table(columns)


def _single(column: Any, name: str, file: Path) -> Any:
    """Return a column of single values, decoded from dictionaries."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        refuse_type(file, name, str(kind))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    return column


def _id_text(column: Any, name: str, file: Path) -> Any:
    """Return identifiers as dictionary-encoded text, whole floating-point numbers as integers.

    Missing values stay null, and NaN becomes the text `nan`.
    """
    column = _single(column, name, file)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        text = column.cast(pa.string())
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        series = pl.Series(column.cast(pa.float64()).to_numpy())
        whole = (series == series.floor()) & (series.abs() < 2**53)
        integers = pl.when(whole).then(series.cast(pl.Int64, strict=False).cast(pl.String))
        values = pl.select(integers.otherwise(series.cast(pl.String)).alias("id")).to_series()
        text = values.to_arrow().cast(pa.string())
        if column.null_count:
            text = pc.if_else(column.combine_chunks().is_null(), None, text)
        text = pa.chunked_array([text])
    else:
        refuse_type(file, name, str(kind))
    return text.dictionary_encode()
