"""Read exposure logs, events and feedback into tables of the columns of `orchard.feedback.schema`.

Shapes:  R rows
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from orchard.errors import DataError
from orchard.feedback.schema import EVENTS, EVENTS_NEEDED, EXPOSURES, FEEDBACK, ROWS, is_feedback

_READERS = {
    ".parquet": pl.read_parquet,
    ".csv": pl.read_csv,
    ".jsonl": pl.read_ndjson,
    ".ndjson": pl.read_ndjson,
}


def read_exposures(log: Path) -> pl.DataFrame:
    """Read an exposure log, a Parquet file or a folder of them; what was not shown is left out.

    Raises:
        DataError: there is no such file, it is unreadable or lacks a column, or nothing was shown.
    """
    table = _read(log, role="exposure log", suffixes=(".parquet",), remedy="serve.exposure")
    missing = [name for name in EXPOSURES if name not in table.columns]
    if missing:
        raise DataError(
            f"exposure log {log} has no column {', '.join(missing)}; give the folder that "
            "serve.exposure names",
            code="data.no_column",
        )
    shown = _cast(table, EXPOSURES, f"exposure log {log}").filter(
        ~pl.col("shadow").fill_null(False)
    )
    if shown.is_empty():
        raise DataError(
            f"exposure log {log} has {len(table)} rows, none of which was shown to a user; there "
            "is nothing to learn from yet",
            code="data.no_exposures",
        )
    broken = shown.select(
        (
            pl.col("time").is_null() | pl.col("time").is_nan()
            | pl.col("request_id").is_null() | pl.col("item_id").is_null()
        ).sum()
    ).item()  # fmt: skip
    if broken:
        raise DataError(
            f"{broken} of {len(shown)} exposures in {log} lack their request_id, item_id or time; "
            "the log was changed after the endpoint wrote it, give the original",
            code="data.missing_value",
        )
    return shown


def read_events(path: Path) -> pl.DataFrame:
    """Read events: a Parquet, CSV or JSON-lines file, or a folder of such files.

    Users and requests may be numbers, times may be timestamps; other columns are ignored.

    Raises:
        DataError: there is no such file, it is unreadable, or a column is missing or of a type that
            cannot be converted.
    """
    table = _read(path, role="events", suffixes=tuple(_READERS), remedy="EVENTS")
    missing = [name for name in EVENTS_NEEDED if name not in table.columns]
    if not {"request_id", "user"} & set(table.columns):
        missing.append("request_id or user")
    if missing:
        raise DataError(
            f"events {path} have columns {', '.join(table.columns)} but no {', '.join(missing)}; "
            "rename the ones that are meant",
            code="data.no_column",
        )
    if table.schema["time"].is_temporal():
        table = table.with_columns(pl.col("time").dt.epoch("us") / 1e6)
    absent = [
        pl.lit(1.0 if name == "value" else None).cast(kind).alias(name)
        for name, kind in EVENTS.items()
        if name not in table.columns
    ]
    events = _cast(table.with_columns(absent), EVENTS, f"events {path}")
    return events.with_columns(pl.col("value").fill_null(1.0))


def read_feedback(folders: Sequence[Path]) -> pl.DataFrame:
    """Read the rows of feedback folders, one after the other.

    Raises:
        DataError: a folder holds no feedback, or there are no rows.
    """
    tables: list[pl.DataFrame] = []
    for folder in folders:
        if not is_feedback(folder):
            raise DataError(
                f"{folder} holds no feedback ({ROWS}); make it with `orchard data feedback`, or "
                "check data.feedback",
                code="data.no_file",
            )
        table = _read(
            folder / ROWS, role="feedback", suffixes=(".parquet",), remedy="data.feedback"
        )
        missing = [name for name in FEEDBACK if name not in table.columns]
        if missing:
            raise DataError(
                f"feedback {folder} has no column {', '.join(missing)}; make it again with "
                "`orchard data feedback`",
                code="data.no_column",
            )
        tables.append(_cast(table, FEEDBACK, f"feedback {folder}"))
    rows = pl.concat(tables)
    if rows.is_empty():
        raise DataError(
            f"feedback {', '.join(str(f) for f in folders)} has no rows; nothing was shown",
            code="data.no_exposures",
        )
    unusable = rows.filter(
        ~(pl.col("reward").is_finite() & pl.col("weight").is_finite() & (pl.col("weight") >= 0))
        .fill_null(False)
    )  # fmt: skip
    if not unusable.is_empty():
        first = unusable.row(0, named=True)
        raise DataError(
            f"{len(unusable)} rows of feedback have a reward or weight that cannot be learned "
            f"from, such as reward {first['reward']} and weight {first['weight']} of item "
            f"{first['item_id']}; rewards must be finite and weights at least 0",
            code="data.bad_reward",
        )
    return rows


def _read(path: Path, *, role: str, suffixes: tuple[str, ...], remedy: str) -> pl.DataFrame:
    """Read a file, or the files of a folder that do not begin with a dot, into one table.

    Tables of different columns are joined by name, absent ones being null.
    """
    files = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in suffixes and not file.name.startswith(".")
        )
    if not files or not files[0].is_file():
        raise DataError(
            f"{role} {path} does not exist or holds no {' or '.join(suffixes)} file; check "
            f"{remedy}",
            code="data.no_file",
        )
    tables: list[pl.DataFrame] = []
    for file in files:
        reader = _READERS.get(file.suffix)
        if reader is None or file.suffix not in suffixes:
            raise DataError(
                f"{file} is no {' or '.join(suffixes)} file; write the {role} as one",
                code="data.unreadable",
            )
        try:
            tables.append(reader(file))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(
                f"{role} file {file} cannot be read: {error}; write it again",
                code="data.unreadable",
            ) from error
    return pl.concat(tables, how="diagonal_relaxed")


def _cast(table: pl.DataFrame, schema: Mapping[str, Any], where: str) -> pl.DataFrame:
    """Select the columns of a schema, converted to its types."""
    for name, kind in schema.items():
        try:
            table = table.with_columns(pl.col(name).cast(kind))
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"column `{name}` of {where} holds {table.schema[name]}, of which a value is no "
                f"{kind}: {str(error).splitlines()[0]}",
                code="data.wrong_type",
            ) from error
    return table.select(list(schema))
