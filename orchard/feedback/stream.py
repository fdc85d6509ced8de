"""Sources of events that go on: a folder that grows, and a Redis stream read by a consumer group.

A source is read after an *offset*, a small JSON value that says what has been read. Whoever reads
keeps events and offset in one atomic write (`orchard.feedback.event_store`), and acknowledges
after it. A reader that is killed anywhere reads on after the offset that it kept: what it had read
without keeping it comes again, and what it kept without acknowledging it does not.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import polars as pl

from orchard.errors import DataError
from orchard.feedback.schema import EVENTS, EVENTS_NEEDED

Offset = Mapping[str, Any]
"""Position in a source up to which it has been read, as a JSON object; empty at first."""


@dataclass(frozen=True, kw_only=True)
class EventBatch:
    """Events that a source gave, and the offset after them."""

    events: pl.DataFrame
    """Events in the columns of `orchard.feedback.schema.EVENTS`."""
    offset: Offset
    refused: int = 0
    """Number of entries that are no events and are passed over."""


@runtime_checkable
class EventSource(Protocol):
    """Source of events that is read piece by piece."""

    def read(self, offset: Offset, limit: int) -> EventBatch:
        """Return about `limit` events after an offset; none if there are no more at the moment.

        Raises:
            DataError: the source cannot be read.
        """
        ...

    def acknowledge(self, offset: Offset) -> None:
        """Tell the source that everything up to an offset is kept."""
        ...


class FolderSource:
    """Folder to which files of events are added: Parquet, CSV, or JSON lines.

    Parquet files are read whole and must appear in one move; the others may grow by whole lines.
    Names that begin with a dot are passed over. The offset of a file is its number of read bytes.
    """

    def __init__(self, folder: Path) -> None:
        """Read a folder, which need not exist yet."""
        self._folder = folder

    def read(self, offset: Offset, limit: int) -> EventBatch:
        """Return the new events of the next files in the order of their names."""
        present = self._files()
        # A file that is gone is forgotten, so that the offset does not grow for ever.
        new_offset = {name: read for name, read in offset.items() if name in present}
        parts: list[pl.DataFrame] = []
        refused = found = 0
        for name, path in present.items():
            if found >= limit:
                break
            rows, read = _new_rows(path, int(new_offset.get(name, 0)))
            if rows is None:
                continue
            events, bad = as_events(rows, prefix=f"{name}:{new_offset.get(name, 0)}")
            parts.append(events)
            found, refused = found + len(events), refused + bad
            new_offset[name] = read
        events = pl.concat(parts) if parts else pl.DataFrame(schema=EVENTS)
        return EventBatch(events=events, offset=new_offset, refused=refused)

    def acknowledge(self, offset: Offset) -> None:
        """Do nothing; the files stay."""

    def _files(self) -> dict[str, Path]:
        if not self._folder.is_dir():
            return {}
        kinds = (".parquet", ".csv", ".jsonl", ".ndjson")
        return {
            path.name: path
            for path in sorted(self._folder.iterdir())
            if path.suffix in kinds and not path.name.startswith(".")
        }


def _new_rows(path: Path, done: int) -> tuple[pl.DataFrame | None, int]:
    """Return the rows of a file after `done` bytes, None without any, and the bytes read then.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        size = path.stat().st_size
        if size < done:
            raise DataError(
                f"{path} has {size} bytes, of which {done} were read; files may grow but not "
                "shrink, so write another one"
            )
        if size == done:
            return None, done
        if path.suffix == ".parquet":
            return pl.read_parquet(path), size
        with path.open("rb") as file:
            header = file.readline() if path.suffix == ".csv" else b""
            file.seek(max(done, len(header)))
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # the last line may not be whole yet
        if not text.strip() or (path.suffix == ".csv" and not header.endswith(b"\n")):
            return None, done
        read = max(done, len(header)) + len(text)
        if path.suffix == ".csv":
            return pl.read_csv(io.BytesIO(header + text), infer_schema=False), read
        return pl.read_ndjson(io.BytesIO(text), infer_schema_length=None), read
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"events file {path} cannot be read: {error}; repair or move it") from error


def as_events(rows: pl.DataFrame, *, prefix: str) -> tuple[pl.DataFrame, int]:
    """Return rows in the columns of events, and how many are no events.

    A row without `event_id` gets one of `prefix` and its number; a row without `value` gets 1.

    Raises:
        DataError: a needed column is missing.
    """
    missing = [name for name in EVENTS_NEEDED if name not in rows.columns]
    if missing or not {"request_id", "user"} & set(rows.columns):
        raise DataError(
            f"events lack the columns {', '.join(missing) or 'request_id and user'}; columns are "
            f"{', '.join(rows.columns)}"
        )
    number = pl.format(f"{prefix}:{{}}", pl.int_range(pl.len()))
    columns = [
        pl.col(name).cast(kind, strict=False) if name in rows.columns else pl.lit(None, kind)
        for name, kind in EVENTS.items()
    ]
    named = rows.select(
        column.alias(name) for name, column in zip(EVENTS, columns, strict=True)
    ).with_columns(pl.col("event_id").fill_null(number), pl.col("value").fill_null(1.0))
    usable = pl.all_horizontal(pl.col(name).is_not_null() for name in EVENTS_NEEDED)
    events = named.filter(usable & pl.col("time").is_finite())
    return events, len(named) - len(events)
