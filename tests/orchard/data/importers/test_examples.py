"""Splits of a log, and the histories of their rows."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from orchard.catalog import catalog as catalogs
from orchard.data.importers.examples import PARTS, SplitExamples, of_log
from orchard.data.prompts import read_split
from tests.fixtures.logs import bring, csv_file, log_of, rows_of, walks


def test_a_log_becomes_splits_that_the_policy_can_read(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", walks())
    facts = bring(source, tmp_path / "out", max_history=3)
    assert facts["num_events"] == 72
    assert [facts[f"{part}_rows"] for part in PARTS] == [48, 6, 6]
    items = catalogs.from_codes([[i] for i in range(8)], item_id=np.arange(50, 58))
    names = pq.read_table(tmp_path / "out" / "items.parquet").column_names
    assert names == ["item_id", "title"]
    for part in PARTS:
        rows = rows_of(tmp_path / "out", part)
        assert len(read_split([tmp_path / "out" / f"{part}.parquet"], items, max_history=9)) == len(
            rows
        )
        for row in rows:  # items follow one another on the walk
            walk = [*row["history"], row["target"]]
            assert all((a - 50 + 1) % 8 == b - 50 for a, b in pairwise(walk))
            assert len(row["history"]) == min(3, row["timestamp"] // 1000)
    times = [row["timestamp"] for part in PARTS for row in rows_of(tmp_path / "out", part)]
    assert times == sorted(times)


def test_leave_one_out_keeps_the_last_two_events_of_each_user(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", [*walks(), (7, 50, 1), (7, 51, 2), (8, 50, 1)])
    facts = bring(source, tmp_path / "out", split="leave_one_out")
    assert [facts[f"{part}_rows"] for part in PARTS] == [12 * 3 + 1, 12, 12]
    assert facts["users_with_one_event"] == 1
    assert {row["user_id"] for row in rows_of(tmp_path / "out", "train")} == {7, *range(100, 112)}
    for row in rows_of(tmp_path / "out", "test"):
        assert len(row["history"]) == 5


def test_equal_histories_with_different_targets_stay_separate(tmp_path: Path) -> None:
    rows = [(user, item, time) for user in range(10) for time, item in enumerate((1, 2 + user))]
    bring(csv_file(tmp_path / "log.csv", rows), tmp_path / "out")
    written = [row for part in PARTS for row in rows_of(tmp_path / "out", part)]
    assert [row["history"] for row in written] == [[1]] * 10
    assert sorted(row["target"] for row in written) == list(range(2, 12))


def test_examples_know_their_histories() -> None:
    examples: SplitExamples = of_log(
        log_of([(0, i, i) for i in range(12)]), split="chronological", max_history=3
    )
    item, start = examples.history(np.array([0, 4]))
    assert item.tolist() == [0, 2, 3, 4]
    assert start.tolist() == [0, 1, 4]
