"""A folder that grows, whose lines and files are read once each."""

from pathlib import Path

import polars as pl
import pytest

from orchard.errors import DataError
from orchard.feedback.schema import EVENTS
from orchard.feedback.stream import FolderSource

ROOT = Path(__file__).parents[3]
COLUMNS = {"time": [1.0, 2.0], "user": ["ann", "bob"], "item_id": [3, 4], "behavior": ["click"] * 2}


def test_a_folder_gives_each_line_and_each_file_once(tmp_path: Path) -> None:
    source = FolderSource(tmp_path / "events")
    assert len(source.read({}, 10).events) == 0
    (tmp_path / "events").mkdir()
    pl.DataFrame(COLUMNS).write_parquet(tmp_path / "events" / "a.parquet")
    lines = tmp_path / "events" / "b.jsonl"
    one = '{"time": 5, "request_id": "r", "item_id": 7, "behavior": "buy", "value": 2}\n'
    lines.write_text(one + one[:20])  # the second line is still being written
    table = tmp_path / "events" / "c.csv"
    table.write_text("time,user,item_id,behavior\n8,ann,1,view\n")
    first = source.read({}, 100)
    assert first.events.schema == EVENTS
    assert first.events["item_id"].to_list() == [3, 4, 7, 1]
    assert first.events["value"].to_list() == [1.0, 1.0, 2.0, 1.0]
    assert len(set(first.events["event_id"])) == 4
    assert len(source.read(first.offset, 100).events) == 0
    with lines.open("a") as file:
        file.write(one[20:])
    with table.open("a") as file:
        file.write("9,ann,2,view\n")
    second = source.read(first.offset, 100)
    assert second.events["item_id"].to_list() == [7, 2]
    assert len(set(second.events["event_id"]) | set(first.events["event_id"])) == 6
    lines.write_text("")
    with pytest.raises(DataError, match="may grow but not shrink"):
        source.read(second.offset, 100)


def test_rows_that_are_no_events_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "time,user,item_id,behavior\nsoon,ann,1,view\n2,ann,shoe,view\n3,ann,4,view\nnan,b,1,view\n"
    )
    batch = FolderSource(tmp_path).read({}, 100)
    assert batch.events["item_id"].to_list() == [4]
    assert batch.refused == 3
    (tmp_path / "b.csv").write_text("time,item_id,behavior\n1,2,view\n")
    with pytest.raises(DataError, match="request_id and user"):
        FolderSource(tmp_path).read({}, 100)
