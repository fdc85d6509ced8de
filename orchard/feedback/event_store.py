"""Keep the events of a source exactly once, and cut them into windows of event time.

Each file of the store holds the events of one read and, in its metadata, the offset of the source
after them, so that both are kept by one rename. The store of a reader that was killed therefore
knows what it holds; the source is acknowledged only after the rename.

A *window* ends at a time. It holds all events before that time which no earlier window holds:
those that came in time, those that came early, and late ones of earlier windows, which are counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from orchard.errors import DataError
from orchard.feedback.schema import EVENTS
from orchard.feedback.stream import EventSource, Offset
from orchard.folders import atomic_file

_OFFSET = b"orchard.offset"
_REFUSED = b"orchard.refused"


@dataclass(frozen=True, kw_only=True)
class WindowEnd:
    """End of a window: a time, and how much of the store had been read when it was closed."""

    time: float
    """Time in seconds since 1970; the window holds no event from then on."""
    files: int
    """Number of files of the store at that moment."""


BEGINNING = WindowEnd(time=float("-inf"), files=0)
"""End of the window before the first."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Events of one window."""

    events: pl.DataFrame
    late: int
    """Number of events that are older than the window, and came after theirs was closed."""


class EventStore:
    """Folder of the events that were read from one source; one process writes to it."""

    def __init__(self, folder: Path) -> None:
        """Open or create the folder.

        Raises:
            DataError: a file of the store is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = sorted(folder.glob("[0-9]*.parquet"))
        if [path.stem for path in self._files] != [f"{n:08d}" for n in range(len(self._files))]:
            raise DataError(
                f"the event store {folder} lacks files between {self._files[0].name} and "
                f"{self._files[-1].name}; restore them, or begin with an empty folder"
            )
        self.offset: Offset = {}
        """Offset of the source after everything in the store."""
        self.refused = 0
        """Number of entries of the source that were no events."""
        if self._files:
            metadata = self._metadata(self._files[-1])
            self.offset, self.refused = metadata[_OFFSET], metadata[_REFUSED]

    @property
    def num_files(self) -> int:
        """Number of files in the store."""
        return len(self._files)

    def ingest(self, source: EventSource, *, limit: int = 10_000) -> int:
        """Take the next events from the source into the store, then acknowledge them.

        Returns:
            The number of events; 0 if the source has none at the moment.
        """
        batch = source.read(self.offset, limit)
        if batch.offset != self.offset:
            self._keep(batch.events, batch.offset, self.refused + batch.refused)
            source.acknowledge(batch.offset)
        return len(batch.events)

    def ingest_all(self, source: EventSource, *, limit: int = 10_000) -> int:
        """Take events until the source has no more at the moment; return their number."""
        total = 0
        while True:
            before = self.offset
            total += self.ingest(source, limit=limit)
            if self.offset == before:
                return total

    def newest(self) -> float:
        """Return the time of the newest event; minus infinity without any."""
        newest = self._scan(0).select(pl.col("time").max()).collect().item()
        return float("-inf") if newest is None else float(newest)

    def since(self, time: float) -> pl.DataFrame:
        """Return the events from a time on, by time."""
        events = self._scan(0).filter(pl.col("time") >= time).sort("time", "event_id").collect()
        return events.drop("file")

    def window(self, last: WindowEnd, end: WindowEnd) -> Window:
        """Return the events of the window between two ends, by time."""
        known = (pl.col("time") < last.time) & (pl.col("file") < last.files)
        mine = (pl.col("time") < end.time) & (pl.col("file") < end.files) & ~known
        events = self._scan(end.files).filter(mine).sort("time", "event_id").collect()
        return Window(events=events.drop("file"), late=int((events["time"] < last.time).sum()))

    def _scan(self, num_files: int) -> pl.LazyFrame:
        """Return the events of the first files, of all with 0, with the number of their file."""
        parts = [
            pl.scan_parquet(path).with_columns(pl.lit(number).alias("file"))
            for number, path in enumerate(self._files[: num_files or None])
        ]
        empty = pl.LazyFrame(schema={**EVENTS, "file": pl.Int32})
        return pl.concat([empty, *parts]) if parts else empty

    def _keep(self, events: pl.DataFrame, offset: Offset, refused: int) -> None:
        """Write events and offset as the next file, with one rename."""
        path = self._folder / f"{len(self._files):08d}.parquet"
        table = events.select(EVENTS.names()).to_arrow()
        metadata = {_OFFSET: json.dumps(dict(offset)), _REFUSED: json.dumps(refused)}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
        with atomic_file(path) as partial:
            pq.write_table(table, partial)
        self._files.append(path)
        self.offset, self.refused = dict(offset), refused

    def _metadata(self, path: Path) -> dict[bytes, Any]:
        """Return offset and refused of a file."""
        try:
            found: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
            return {key: json.loads(found[key]) for key in (_OFFSET, _REFUSED)}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"file {path} of the event store is damaged; remove it if it is the last one: the "
                "source gives its events again"
            ) from error


def replayed(
    older: Sequence[pl.DataFrame], *, share: float, rows: int, seed: int, window: int
) -> pl.DataFrame | None:
    """Choose requests of older windows, so that about `share` of what is learned from is old.

    Args:
        older: feedback rows of earlier windows; each has the columns `request_id` and `time`.
        share: wanted share of older rows among all, below 1.
        rows: number of rows of the new window.
        seed: seed of the choice.
        window: number of the window; another one chooses other requests.

    Returns:
        Whole requests of about `share / (1 - share) * rows` rows; None without any.
    """
    wanted = round(share / (1 - share) * rows)
    present = [frame for frame in older if len(frame)]
    if not wanted or not present:
        return None
    every = pl.concat(present)
    requests = every.group_by("request_id").len().sort("request_id")
    order = np.random.default_rng([seed, window]).permutation(len(requests))
    count = requests["len"].to_numpy()[order]
    taken = order[np.cumsum(count) - count < wanted]
    return every.filter(pl.col("request_id").is_in(requests["request_id"].gather(taken).implode()))
