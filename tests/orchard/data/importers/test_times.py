"""Times of any unit and notation become integers of one unit, and what is odd is counted."""

from typing import Any

import pyarrow as pa
import pytest

from orchard.data.importers.times import Times, parse
from orchard.errors import DataError

SECOND = 1_600_193_562


def times(*parts: list[Any], kind: pa.DataType | None = None) -> Times:
    return parse([pa.chunked_array([pa.array(part, kind)]) for part in parts], "log.csv", 2)


@pytest.mark.parametrize(
    ("scales", "names"),
    [
        ((1, 10**3), ("seconds", "milliseconds")),
        ((1, 10**6), ("seconds", "microseconds")),
        ((10**3, 10**9), ("milliseconds", "nanoseconds")),
    ],
)
def test_units_are_found_row_by_row_and_counted(
    scales: tuple[int, int], names: tuple[str, str]
) -> None:
    found = times([str(SECOND * scales[0]), str((SECOND + 1) * scales[1]), str(SECOND * scales[1])])
    assert found.value.tolist() == [
        SECOND * scales[1],
        (SECOND + 1) * scales[1],
        SECOND * scales[1],
    ]
    assert found.counts == {f"times_in_{names[0]}": 1, f"times_in_{names[1]}": 2}
    assert "mixes times" in found.notes[0]


def test_numbers_of_one_unit_stay_and_those_far_from_the_others_are_counted() -> None:
    assert times([SECOND, SECOND + 1]).value.tolist() == [SECOND, SECOND + 1]
    assert times([SECOND, SECOND + 1]).counts == {}
    assert times([SECOND, 0, 5]).counts == {"times_outside_1990_to_2100": 2}
    order = times([3, 1, 2])
    assert order.value.tolist() == [3, 1, 2]
    assert "no known unit" in order.notes[0]


def test_fractions_keep_the_order_within_a_second() -> None:
    assert times([SECOND + 0.5, float(SECOND)]).value.tolist() == [
        1000 * SECOND + 500,
        1000 * SECOND,
    ]
    mixed = times([f"{SECOND}.25", str(SECOND * 1000)])
    assert mixed.counts == {"times_in_seconds": 1, "times_in_milliseconds": 1}
    assert mixed.value[0] - mixed.value[1] == 250_000


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("2020-09-15 18:12:42", 0),
        ("2020-09-15T18:12:42Z", 0),
        ("2020/09/15 18:12:42.5", 500_000),
        ("2020-09-15T20:12:42+02:00", 0),
        ("2020-09-15T20:12:42.000001+0200", 1),
        ("15.09.2020 18:12:42", 0),
        ("9/15/2020 18:12:42", 0),
    ],
)
def test_dates_of_usual_notations(text: str, microseconds: int) -> None:
    assert times([text]).value.tolist() == [SECOND * 10**6 + microseconds]


def test_nanoseconds_are_kept_and_dates_may_stand_among_seconds() -> None:
    fine = times(["2020-09-15T18:12:42.123456789Z", "2020-09-15T18:12:42Z"])
    assert fine.value.tolist() == [SECOND * 10**9 + 123_456_789, SECOND * 10**9]
    parts = times([SECOND + 1])
    both = parse(
        [pa.chunked_array([[SECOND + 1]]), pa.chunked_array([["2020-09-15 18:12:42"]])], "log", 1
    )
    assert both.value.tolist() == [(SECOND + 1) * 10**6, SECOND * 10**6]
    assert parts.value.tolist() == [SECOND + 1]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_typed_times_keep_their_unit(unit: str) -> None:
    assert times([7, 8], kind=pa.timestamp(unit)).value.tolist() == [7, 8]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2020-09-15", "5"], "row 3 .* has the time 5, a number in no known unit, among dates"),
        (["01/02/2024", "03/04/2024"], "whether the day or the month comes first"),
        (["31/01/2024", "01/31/2024"], "whether the day or the month comes first"),
        (["2024-01-01", "2024-02-30"], "row 3 .* has the time '2024-02-30'"),
        (["2024-01-01 25:00:00"], "no number and no date"),
        ([True, False], "give numbers or dates"),
    ],
)
def test_what_is_no_time_is_refused(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        times(values)
