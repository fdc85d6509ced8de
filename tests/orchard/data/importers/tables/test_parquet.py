"""Identifiers of any plain type become text; lists, structures and bytes are refused."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.data.importers.tables.table import inspect, read_columns
from orchard.errors import DataError


def ids(folder: Path, *parts: Any) -> list[Any]:
    for number, part in enumerate(parts):
        pq.write_table(pa.table({"id": part}), folder / f"{number}.parquet")
    read, _ = read_columns(inspect(folder), ["id"], ["id"], lambda count: None)
    return [value for part in read for value in part["id"].cast(pa.string()).to_pylist()]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2], pa.uint8()),
        pa.array([1.0, 2.0]),
        pa.array(["1", "2"], pa.large_string()),
        pa.array(["1", "2"]).dictionary_encode(),
        pa.array([Decimal(1), Decimal(2)], pa.decimal128(10, 0)),
    ],
)
def test_identifiers_of_plain_types_are_the_same_text(tmp_path: Path, values: Any) -> None:
    assert ids(tmp_path, values, pa.array([3, 4])) == ["1", "2", "3", "4"]


def test_gaps_stay_gaps(tmp_path: Path) -> None:
    assert ids(tmp_path, pa.array([1.0, None, float("nan")])) == ["1", None, "NaN"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1], [2]]),
        pa.array([[1], [2]], pa.list_(pa.int64(), 1)),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([b"1", b"2"]),
        pa.array([b"1", b"2"], pa.binary(1)),
        pa.array([0, 1], pa.timestamp("s")),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, values: Any) -> None:
    with pytest.raises(DataError, match=r"column `id` of .* holds .*: write one row per value"):
        ids(tmp_path, values)
