"""The store keeps every event once, whatever its reader was doing, and cuts it into windows."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from orchard.errors import DataError
from orchard.feedback.event_store import BEGINNING, EventStore, WindowEnd, replayed
from orchard.feedback.schema import EVENTS
from orchard.feedback.stream import EventBatch, Offset


class ListSource:
    """Source of events with the given times, whose offset is a number."""

    def __init__(self, times: list[float]) -> None:
        self.times, self.acknowledged = times, list[int]()

    def read(self, offset: Offset, limit: int) -> EventBatch:
        first = int(offset.get("n", 0))
        rows = [
            {"event_id": f"e{n}", "time": self.times[n], "user": "u", "item_id": n,
             "behavior": "click", "value": 1.0}
            for n in range(first, min(first + limit, len(self.times)))
        ]  # fmt: skip
        events = pl.DataFrame(rows, schema=EVENTS)
        return EventBatch(events=events, offset={"n": first + len(rows)} if rows else offset)

    def acknowledge(self, offset: Offset) -> None:
        self.acknowledged.append(int(offset["n"]))


def test_every_event_is_in_one_window_and_late_ones_are_counted(tmp_path: Path) -> None:
    times = np.random.default_rng(0).uniform(0, 100, 40).tolist()
    store, source = EventStore(tmp_path), ListSource(times)
    last, found, late = BEGINNING, list[str](), 0
    for end in (30.0, 60.0, 90.0, 120.0):
        for _ in range(3):
            store.ingest(source, limit=3)
        if end == 120.0:
            store.ingest_all(source)
        ended = WindowEnd(time=end, files=store.num_files)
        window = store.window(last, ended)
        assert window.events["time"].max() < end
        assert window.events["time"].is_sorted()
        assert window.events.schema == EVENTS
        found += window.events["event_id"].to_list()
        late += window.late
        # The same ends give the same window, also later.
        store.ingest(source, limit=2)
        assert store.window(last, ended).events.equals(window.events)
        last = ended
    assert sorted(found) == sorted(f"e{n}" for n in range(40))
    assert late > 0


def test_acknowledged_is_only_what_is_kept(tmp_path: Path) -> None:
    source = ListSource([1.0, 2.0, 3.0])
    store = EventStore(tmp_path)
    assert store.newest() == float("-inf")
    assert store.ingest(source, limit=2) == 2
    assert (dict(store.offset), source.acknowledged) == ({"n": 2}, [2])
    again = EventStore(tmp_path)
    assert dict(again.offset) == {"n": 2}
    assert again.ingest_all(source) == 1
    assert again.newest() == 3.0
    assert again.ingest_all(source) == 0
    assert source.acknowledged == [2, 3]


def test_a_damaged_store_says_what_to_do(tmp_path: Path) -> None:
    store = EventStore(tmp_path)
    store.ingest_all(ListSource([1.0, 2.0, 3.0]), limit=1)
    (tmp_path / "00000002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="the source gives its events again"):
        EventStore(tmp_path)
    (tmp_path / "00000001.parquet").unlink()
    with pytest.raises(DataError, match="lacks files"):
        EventStore(tmp_path)


def feedback(window: int, requests: int, rows: int) -> pl.DataFrame:
    names = [f"{window}-{r}" for r in range(requests) for _ in range(rows)]
    times = [float(window)] * len(names)
    return pl.DataFrame({"request_id": names, "time": times})


def test_a_settable_share_of_what_is_learned_from_is_old() -> None:
    older = [feedback(0, 20, 5), feedback(1, 20, 5)]
    chosen = replayed(older, share=0.25, rows=60, seed=0, window=2)
    assert chosen is not None
    assert len(chosen) == 20
    assert set(chosen.group_by("request_id").len()["len"]) == {5}  # whole requests
    again = replayed(older, share=0.25, rows=60, seed=0, window=2)
    assert again is not None
    assert chosen.equals(again)
    other = replayed(older, share=0.25, rows=60, seed=0, window=3)
    assert other is not None
    assert not chosen.equals(other)
    assert replayed(older, share=0.0, rows=60, seed=0, window=2) is None
    assert replayed([], share=0.5, rows=60, seed=0, window=2) is None
    every = replayed(older, share=0.9, rows=600, seed=0, window=2)
    assert every is not None
    assert len(every) == 200
