"""Collecting a window: which exposures and events are its own, and what is counted."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cluster.loop import collect
from cluster.loop.collect import Collector, SimulatedUsers
from cluster.loop.state import RoundState
from orchard.feedback.event_store import EventStore
from orchard.feedback.schema import EVENTS, EXPOSURES, ROWS
from orchard.feedback.stream import FolderSource
from orchard.settings.loop import LoopConfig
from orchard.simulation.clients import AnsweredVisits, Asking
from orchard.simulation.simulator import ShownLists, Visits, shown_lists


def collector(folder: Path, users: SimulatedUsers | None = None, **settings: Any) -> Collector:
    (folder / "exposures").mkdir(exist_ok=True)
    return Collector(
        settings=LoopConfig.model_validate({"window_s": 10.0, "lateness_s": 0.0} | settings),
        exposures=folder / "exposures", feedback=folder / "feedback",
        source=FolderSource(folder / "arrivals"), store=EventStore(folder / "store"),
        start=1000.0, users=users,
    )  # fmt: skip


def show(folder: Path, name: str, *rows: tuple[str, float, int]) -> None:
    """Write exposures of request, time and item."""
    table = pl.DataFrame(
        [
            {
                "request_id": request, "time": time, "user": "ann", "shadow": False,
                "policy": "1-a", "catalogue": "0-a", "source": "policy", "decoder": "beam",
                "width": 10, "temperature": 1.0, "restricted": False, "history": [1], "rank": rank,
                "item_id": item, "sid": [1], "logprob": [-1.0],
            }
            for rank, (request, time, item) in enumerate(rows, 1)
        ],
        schema=EXPOSURES,
    )  # fmt: skip
    (folder / "exposures").mkdir(exist_ok=True)
    table.write_parquet(folder / "exposures" / f"{name}.parquet")


def happen(folder: Path, name: str, *rows: tuple[str, float, int]) -> None:
    """Write clicks of request, time and item."""
    (folder / "arrivals").mkdir(exist_ok=True)
    events = [
        {"event_id": f"{name}-{n}", "time": time, "request_id": request, "item_id": item,
         "behavior": "click", "value": 1.0}
        for n, (request, time, item) in enumerate(rows)
    ]  # fmt: skip
    pl.DataFrame(events, schema=EVENTS).write_parquet(folder / "arrivals" / f"{name}.parquet")


def test_windows_follow_each_other_and_share_nothing(tmp_path: Path) -> None:
    show(tmp_path, "a", ("r1", 1001.0, 1), ("r1", 1001.0, 2), ("r2", 1009.0, 3))
    show(tmp_path, "b", ("r3", 1011.0, 4))
    happen(tmp_path, "a", ("r1", 1002.0, 2), ("r2", 1010.5, 3))  # the second after the window
    made = collector(tmp_path)
    first = made.collect(RoundState(number=0), None)
    assert first.window_end == 1010.0
    assert dict(zip(first.rows["item_id"], first.rows["reward"], strict=True)) == {1: 0, 2: 1, 3: 1}
    assert first.counts["window_events"] == 1
    assert first.counts["late_events"] == 0
    happen(tmp_path, "b", ("r1", 1003.0, 1), ("r3", 1012.0, 4))  # the first comes too late
    done = RoundState(number=0, window_end=first.window_end, event_files=first.event_files)
    second = made.collect(RoundState(number=1), done)
    assert second.rows["item_id"].to_list() == [4]
    assert second.counts["late_events"] == 1
    assert second.counts["window_events"] == 3
    assert pl.read_parquet(tmp_path / "feedback" / "00001" / ROWS).equals(second.rows)
    again = collector(tmp_path).collect(RoundState(number=1), done)
    assert again.rows.equals(second.rows)


def test_a_window_without_exposures_is_empty(tmp_path: Path) -> None:
    assert collector(tmp_path).collect(RoundState(number=0), None).rows.is_empty()
    show(tmp_path, "a", ("r1", 900.0, 1))
    done = RoundState(number=0, window_end=1010.0, event_files=0)
    assert collector(tmp_path).collect(RoundState(number=1), done).rows.is_empty()


def test_a_request_that_was_answered_twice_counts_by_its_last_answer(tmp_path: Path) -> None:
    show(tmp_path, "a", ("r1", 1001.0, 1), ("r1", 1001.0, 2))
    show(tmp_path, "b", ("r1", 1003.0, 3))
    found = collector(tmp_path).collect(RoundState(number=0), None)
    assert found.rows["item_id"].to_list() == [3]


class OneUser:
    """Simulator of one user who clicks whatever is shown first."""

    def __init__(self) -> None:
        self.remembered: list[str] = []

    def visits(self, window: int) -> Visits:
        raise NotImplementedError

    def respond(self, visits: Visits, shown: ShownLists) -> pl.DataFrame:
        raise NotImplementedError

    def expected_reward(self, visits: Visits, shown: ShownLists) -> np.ndarray:
        raise NotImplementedError

    def remember(self, events: pl.DataFrame) -> None:
        self.remembered += events["event_id"].to_list()


def test_simulated_windows_are_not_simulated_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[pl.DataFrame] = []
    calls: list[int] = []

    def visit(simulator: OneUser, window: int, asking: Asking) -> AnsweredVisits:
        calls.append(window)
        now = time.time()
        show(tmp_path, f"w{window}", (f"w{window}-0", now, 7))
        row = {"event_id": f"e{window}", "time": now, "request_id": f"w{window}-0", "item_id": 7,
               "behavior": "click", "value": 2.0}  # fmt: skip
        events = pl.DataFrame([row], schema=EVENTS)
        simulator.remember(events)
        visits = Visits(
            window=window, user=np.zeros(1, np.int64), time=np.full(1, now),
            history=np.zeros(0, np.int64), history_start=np.zeros(2, np.int64),
        )  # fmt: skip
        return AnsweredVisits(
            visits=visits, shown=shown_lists(["a"], [[7]]), explored=np.zeros(1, np.bool_),
            events=events, failed=0,
        )  # fmt: skip

    monkeypatch.setattr(collect, "visit", visit)

    def users() -> SimulatedUsers:
        return SimulatedUsers(
            simulator=OneUser(), asking=Asking(url=""), visits=tmp_path / "arrivals",
            deliver=delivered.append,
        )  # type: ignore[arg-type]  # fmt: skip

    first = collector(tmp_path, users()).collect(RoundState(number=0), None)
    assert first.rows["reward"].to_list() == [2.0]
    later = users()
    repeated = collector(tmp_path, later).collect(RoundState(number=0), None)
    assert calls == [0]
    assert repeated.rows.equals(first.rows)
    assert later.simulator.remembered == ["e0"]  # type: ignore[attr-defined]
    third = users()
    third.restore(1)
    assert third.simulator.remembered == ["e0"]  # type: ignore[attr-defined]
    assert len(delivered) == 1


def test_shown_lists_are_ragged() -> None:
    shown = shown_lists(["a", "b"], [[1, 2], []])
    assert (shown.item.tolist(), shown.start.tolist()) == ([1, 2], [0, 2, 2])
