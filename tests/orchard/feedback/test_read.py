"""Files of any of the formats, and what is refused."""

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.errors import DataError
from orchard.feedback.join import JoinOptions, join
from orchard.feedback.read import read_events, read_exposures, read_feedback
from orchard.feedback.schema import EVENTS, EXPOSURES, FEEDBACK, ROWS
from orchard.feedback.write import write_feedback
from serve.exposure_log import SCHEMA
from tests.orchard.feedback.conftest import Table


def test_the_columns_that_are_read_are_those_that_the_endpoint_writes() -> None:
    rows = pl.from_arrow(pa.Table.from_pylist([], SCHEMA))
    assert isinstance(rows, pl.DataFrame)
    assert {name: rows.schema[name] for name in EXPOSURES} == EXPOSURES


def test_a_folder_of_logs_is_read_without_what_was_not_shown(
    tmp_path: Path, exposures: Table
) -> None:
    exposures([{"request_id": "a"}]).write_parquet(tmp_path / "1.parquet")
    exposures([{"request_id": "b"}, {"shadow": True}]).write_parquet(tmp_path / "2.parquet")
    (tmp_path / ".3.parquet.partial").write_text("half")
    assert read_exposures(tmp_path)["request_id"].to_list() == ["a", "b"]


def test_a_log_of_nothing_shown_is_refused(tmp_path: Path, exposures: Table) -> None:
    exposures([{"shadow": True}]).write_parquet(tmp_path / "1.parquet")
    with pytest.raises(DataError, match="1 rows, none of which was shown") as error:
        read_exposures(tmp_path)
    assert error.value.code == "data.no_exposures"
    with pytest.raises(DataError, match=r"exposure log .* holds no \.parquet file"):
        read_exposures(tmp_path / "absent")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_events_may_have_any_format_and_lack_what_is_optional(tmp_path: Path, suffix: str) -> None:
    table = pl.DataFrame(
        {"time": [1, 2], "user": [7, 8], "item_id": [5, 6], "behavior": ["view", "buy"]}
    )
    path = tmp_path / f"events.{suffix}"
    {"parquet": table.write_parquet, "csv": table.write_csv, "jsonl": table.write_ndjson}[suffix](
        path
    )
    for given in (path, tmp_path):
        events = read_events(given)
        assert events.schema == EVENTS
        assert events["user"].to_list() == ["7", "8"]
        assert events["value"].to_list() == [1.0, 1.0]
        assert events["request_id"].null_count() == 2


def test_timestamps_become_seconds(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pl.DataFrame(
        {"time": ["2026-01-01T00:00:01.5"], "user": ["u"], "item_id": [5], "behavior": ["view"]}
    ).with_columns(pl.col("time").str.to_datetime()).write_parquet(path)
    assert read_events(path)["time"].to_list() == [1767225601.5]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"time": [1], "item_id": [5], "user": ["u"]}, "no behavior"),
        ({"time": [1], "item_id": [5], "behavior": ["buy"]}, "no request_id or user"),
        (
            {"time": ["noon"], "item_id": [5], "behavior": ["buy"], "user": ["u"]},
            "column `time` of events .*noon",
        ),
    ],
)
def test_events_that_cannot_be_used_are_named(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "events.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(DataError, match=message):
        read_events(path)


def test_feedback_is_read_as_it_was_written(
    tmp_path: Path, exposures: Table, events: Table
) -> None:
    joined = join(exposures([{}, {"item_id": 6}]), events([{}]))
    write_feedback(tmp_path / "a", joined, JoinOptions())
    rows = read_feedback([tmp_path / "a", tmp_path / "a"])
    assert rows.schema == FEEDBACK
    assert rows.equals(pl.concat([joined.rows, joined.rows]))
    with pytest.raises(DataError, match="choose another folder or pass --overwrite"):
        write_feedback(tmp_path / "a", joined, JoinOptions())
    with pytest.raises(DataError, match="holds no feedback"):
        read_feedback([tmp_path])


def test_rewards_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, exposures: Table, events: Table
) -> None:
    write_feedback(tmp_path / "a", join(exposures([{}]), events([])), JoinOptions())
    table = pq.read_table(tmp_path / "a" / ROWS).to_pylist()
    pl.DataFrame([table[0] | {"reward": float("nan")}], FEEDBACK).write_parquet(
        tmp_path / "a" / ROWS
    )
    with pytest.raises(DataError, match="reward nan and weight 1.0 of item 5"):
        read_feedback([tmp_path / "a"])
