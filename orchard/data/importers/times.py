"""Convert columns of times to integers of one unit, whatever the source wrote.

A number in the range of the years 1990 to 2100 in seconds, milliseconds, microseconds or
nanoseconds has that unit, row by row; other numbers are taken as an order.

Shapes:  E events
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers

UNITS = {0: "seconds", 3: "milliseconds", 6: "microseconds", 9: "nanoseconds"}
"""Name of each unit by its power of ten below the second."""
_NUMBER = -1
"""Mark of a number whose unit is not known."""
_FIRST, _LAST = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds
_ISO = (
    r"^(?<y>\d{4})[-/.](?<m>\d{1,2})[-/.](?<d>\d{1,2})"
    r"(?:[T ]+(?<h>\d{1,2}):(?<i>\d{2})(?::(?<s>\d{2})(?:[.,](?<f>\d+))?)?)?"
    r"\s*(?<z>Z|UTC|GMT|[+-]\d{2}:?\d{2})?$"
)
_LOCAL = (
    r"^(?<d>\d{1,2})[-/.](?<m>\d{1,2})[-/.](?<y>\d{4})"
    r"(?:[T ,]+(?<h>\d{1,2}):(?<i>\d{2})(?::(?<s>\d{2})(?:[.,](?<f>\d+))?)?)?"
    r"\s*(?<z>Z|UTC|GMT|[+-]\d{2}:?\d{2})?$"
)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of one unit, and what was found about them."""

    value: Int64[np.ndarray, " E"]
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    """Numbers of rows that were converted or are implausible, by reason."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Times with the unit of each, as a power of ten below the second or `_NUMBER`."""

    value: np.ndarray
    unit: Int64[np.ndarray, " E"]
    notes: tuple[str, ...] = ()


def parse(columns: Sequence[Any], where: str, first: int) -> Times:
    """Convert the times of all parts of a source.

    Args:
        columns: a column per part: numbers, dates, times, or text of either.
        where: name of the file, for messages.
        first: number of the first row in messages.

    Raises:
        DataError: a time is missing, no number and no date, or numbers stand among dates.
    """
    parts: list[_Part] = []
    row = first
    for column in columns:
        parts.append(_part(column, where, row))
        row += len(column)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    # Fractions are kept as thousandths, so numbers of the source are scaled by 10 ** shift.
    shift = 3 if any(_has_fractions(part.value) for part in parts) else 0
    value = np.concatenate([_integers(part, 10**shift) for part in parts])
    unit = np.concatenate([part.unit for part in parts])
    is_number = unit == _NUMBER
    typed = np.unique(unit[~is_number])
    for power in UNITS:  # the unit of each number, by its size
        scale = 10 ** (power + shift)
        if _LAST * scale < 2**63:
            unit[is_number & (value >= _FIRST * scale) & (value < _LAST * scale)] = power
    known, count = np.unique(unit[unit != _NUMBER], return_counts=True)
    if len(known) == 0:
        return Times(
            value=value,
            notes=(*notes, f"the times of {where} are in no known unit; their order is used"),
        )
    unknown = unit == _NUMBER
    if len(typed) and unknown.any():
        bad = int(np.argmax(unknown))
        raise DataError(
            f"row {first + bad} of {where} has the time {value[bad] / 10**shift:g}, a number in no "
            f"known unit, among dates ({int(unknown.sum())} such rows); correct it or drop the row"
        )
    counts: dict[str, int] = {}
    unit[unknown] = int(known[np.argmax(count)])  # as most rows
    exponent = unit + shift * is_number
    seconds = value / 10.0**exponent
    implausible = int(((seconds < _FIRST) | (seconds >= _LAST)).sum())
    if len(known) > 1:
        names = [UNITS[int(power)] for power in known]
        for name, rows in zip(names, count.tolist(), strict=True):
            counts[f"times_in_{name}"] = rows
        value = _converted(value, exponent, int(exponent.max()), where)
        notes = (
            *notes,
            f"{where} mixes times in {' and '.join(names)} "
            f"({', '.join(str(rows) for rows in count.tolist())} rows); all became one unit",
        )
    if implausible:
        counts["times_outside_1990_to_2100"] = implausible
    return Times(value=value, counts=counts, notes=notes)


def _has_fractions(value: np.ndarray) -> bool:
    return np.issubdtype(value.dtype, np.floating) and bool((value != np.floor(value)).any())


def _integers(part: _Part, scale: int) -> Int64[np.ndarray, " E"]:
    """Return the times of a part as integers, its numbers multiplied by `scale`."""
    value = part.value
    if np.issubdtype(value.dtype, np.floating):
        return np.clip(np.floor(value * scale), -(2.0**62), 2.0**62).astype(np.int64)
    value = value.astype(np.int64)
    return np.where(part.unit == _NUMBER, value * scale, value) if scale > 1 else value


def _converted(
    value: Int64[np.ndarray, " E"], unit: Int64[np.ndarray, " E"], target: int, where: str
) -> Int64[np.ndarray, " E"]:
    scale = 10 ** (target - unit)
    if (np.abs(value / 1.0) * scale > 2.0**62).any():
        raise DataError(
            f"{where} mixes units of time over too long a span for one of them; write one unit"
        )
    return value * scale


def _part(column: Any, where: str, first: int) -> _Part:
    """Return the times of one part."""
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(
            f"row {first + row} of {where} has no time ({column.null_count} such rows); fill it in "
            "or drop the row"
        )
    kind = column.type
    if pa.types.is_date(kind):
        return _typed(column.cast(pa.timestamp("s")), 0)
    if pa.types.is_timestamp(kind):
        return _typed(column, {"s": 0, "ms": 3, "us": 6, "ns": 9}[kind.unit])
    if pa.types.is_string(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            return _of_text(column, where, first)
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"the times of {where} are {kind}; give numbers or dates")
    values = np.asarray(column.to_numpy())
    if values.dtype == np.uint64:
        values = values.clip(max=2**63 - 1)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"row {first + bad[0]} of {where} has the time {values[bad[0]]} ({len(bad)} such "
            "rows); correct it or drop the row"
        )
    return _Part(value=values, unit=np.full(len(values), _NUMBER, dtype=np.int64))


def _typed(column: Any, power: int) -> _Part:
    values = column.cast(pa.int64()).to_numpy().astype(np.int64)
    return _Part(value=values, unit=np.full(len(values), power, dtype=np.int64))


def _of_text(column: Any, where: str, first: int) -> _Part:
    """Parse text of numbers and dates, row by row."""
    text = pl.Series("time", pl.from_arrow(column)).cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    is_number = (number.is_not_null() & number.is_finite()).fill_null(False).to_numpy()
    if is_number.all():
        whole = text.cast(pl.Int64, strict=False)
        values = (whole if whole.null_count() == 0 else number).to_numpy()
        return _Part(value=values, unit=np.full(len(text), _NUMBER, dtype=np.int64))
    nanoseconds, notes = _dates(text, where)
    bad = np.flatnonzero(~is_number & nanoseconds.is_null().to_numpy())
    if len(bad):
        value = text[int(bad[0])]
        shown = value if number[int(bad[0])] is not None else repr(value)  # nan, inf
        raise DataError(
            f"row {first + bad[0]} of {where} has the time {shown}, which is no "
            f"number and no date like 2024-01-31 12:00:00 ({len(bad)} such rows); correct it or "
            "drop the row"
        )
    ticks = nanoseconds.fill_null(0).to_numpy().copy()
    # Dates are microseconds unless they are finer than that.
    power = 9 if (ticks % 1000).any() else 6
    ticks //= 10 ** (9 - power)
    unit = np.where(is_number, _NUMBER, power)
    whole = text.cast(pl.Int64, strict=False).fill_null(number.floor().cast(pl.Int64, strict=False))
    ticks[is_number] = whole.fill_null(0).to_numpy()[is_number]
    return _Part(value=ticks, unit=unit, notes=notes)


def _dates(text: pl.Series, where: str) -> tuple[pl.Series, tuple[str, ...]]:
    """Return dates as nanoseconds since 1970 in UTC, null where they are none."""
    notes: list[str] = []
    fields = text.str.extract_groups(_ISO).struct.unnest()
    if fields["y"].null_count() == len(text):  # the day before the month, or after it
        fields = text.str.extract_groups(_LOCAL).struct.unnest()
        largest = [int(fields[n].cast(pl.Int64).max() or 0) for n in ("d", "m")]  # type: ignore[arg-type]
        if max(largest) > 0 and (largest[0] > 12) == (largest[1] > 12):
            raise DataError(
                f"the dates of {where}, such as {text[0]!r}, do not say whether the day or the "
                "month comes first; write them as 2024-01-31"
            )
        if largest[1] > 12:
            fields = fields.rename({"d": "m", "m": "d"})
        if max(largest) > 0:
            notes.append(
                f"the {'month' if largest[1] > 12 else 'day'} comes first in dates of {where}"
            )
    number = {n: pl.col(n).cast(pl.Int64, strict=False).fill_null(0) for n in "hisf"}
    clock = number["h"] * 3600 + number["i"] * 60 + number["s"]
    zone = pl.col("z")
    offset = (
        zone.str.slice(1, 2).cast(pl.Int64, strict=False).fill_null(0) * 3600
        + zone.str.slice(-2).cast(pl.Int64, strict=False).fill_null(0) * 60
    ) * pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    day = pl.concat_str("y", "m", "d", separator="-").str.to_date("%Y-%m-%d", strict=False)
    valid = (number["h"] < 24) & (number["i"] < 60) & (number["s"] < 61)
    valid &= day.dt.year().is_between(1678, 2261)
    fraction = pl.col("f").str.slice(0, 9).str.pad_end(9, "0").cast(pl.Int64, strict=False)
    seconds = day.cast(pl.Int64) * 86_400 + clock - offset
    result = fields.select(
        pl.when(valid).then(seconds * 1_000_000_000 + fraction.fill_null(0)).alias("time"),
        zone.is_not_null().alias("zoned"),
    )
    zoned = int(result["zoned"].sum())
    if 0 < zoned < int(result["time"].is_not_null().sum()):
        notes.append(f"some times of {where} name their zone and some do not; those are UTC")
    return result["time"], tuple(notes)
