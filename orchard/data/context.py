"""Read columns of context of the splits: values of events, of rows, and gaps between events.

`data.context` names them. A column `behavior` is the lists `history_behavior` of a split, with one
value for each item of `history`, or else its column `behavior`, with one value for the row. Values
are text, numbers or booleans; a missing one is unknown. Those of the training rows have tokens.

Shapes:  H history items   R rows (R1 = R + 1)   E columns of events   U columns of rows
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Float64, Int64
from transformers import PreTrainedTokenizerBase

from orchard import ragged
from orchard.context import GAPS, UNKNOWN, Context, ContextColumn, gap_numbers, saved_columns
from orchard.data.columns import combined
from orchard.errors import ConfigError, DataError
from orchard.parquet import read_table
from orchard.settings import DataConfig
from orchard.settings.data import GAP

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers
_log = logging.getLogger("orchard")
_MOST_VALUES = 1000
"""Largest number of values of a column, each of which is a token."""
_PER_SECOND = (1, 10**3, 10**6, 10**9)
"""Units of numeric times: seconds, milliseconds, microseconds, nanoseconds."""
_LAST_SECOND = 4.2e9
"""Second in 2103 up to which a number is a time in seconds."""


def columns_of(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase | None, *, may_add: bool
) -> tuple[ContextColumn, ...]:
    """Return the columns of context of a run, with the values that have tokens.

    They are those of the policy that the run starts from or, where it has none, those of the
    training files.

    Args:
        data: settings of the data.
        tokenizer: tokenizer of the policy that the run starts from; None for a new one.
        may_add: whether the phase may add tokens to the policy.

    Raises:
        ConfigError: the policy reads other context than `data.context`.
        DataError: a file has no such column, or one of too many values.
    """
    saved = () if tokenizer is None else saved_columns(tokenizer)
    names = tuple(column.name for column in saved)
    if saved and names != data.context:
        raise ConfigError(
            f"data.context = {list(data.context)}, and the policy was trained with {list(names)}; "
            f"set data.context = {list(names)}, or train a new policy",
            code="config.other_context",
        )
    if data.context and not saved and not may_add and tokenizer is not None:
        raise ConfigError(
            f"data.context = {list(data.context)}, and the policy has no tokens for any context; "
            "run `orchard sft` with it first, or leave data.context out",
            code="config.no_context",
        )
    if saved or not data.context:
        return saved
    tables = [
        read_table(
            data.path / name, role="split", columns=("history",), remedy="data.path and data.train"
        )
        for name in data.train
    ]
    return tuple(_column(tables, name, ", ".join(data.train)) for name in data.context)


def _column(tables: Sequence[Any], name: str, files: str) -> ContextColumn:
    """Return a column with the values that the tables have."""
    lists = f"history_{name}"
    has = [lists in table.column_names for table in tables]
    if name == GAP and not any(has):
        return ContextColumn(name=GAP, per_event=True, values=GAPS)
    source = lists if any(has) else name
    parts = [_text(_source(table, source, files), per_event=any(has)) for table in tables]
    if any(has):
        parts = [part.flatten() for part in parts]
    values = sorted({value for part in parts for value in pc.unique(part).to_pylist()} - {None})
    if len(values) > _MOST_VALUES:
        raise DataError(
            f"column `{source}` of {files} has {len(values)} values, and each becomes a token; "
            f"put them into at most {_MOST_VALUES} groups",
            code="data.many_values",
        )
    return ContextColumn(name=name, per_event=any(has), values=tuple(values))


def _source(table: Any, source: str, files: str) -> Any:
    """Return a column of a table as one array."""
    if source not in table.column_names:
        raise DataError(
            f"{files} has columns {', '.join(table.column_names)} but no `{source}`, which "
            "data.context asks for; add it, or leave it out of data.context",
            code="data.no_column",
        )
    return combined(table[source])


def _text(column: Any, *, per_event: bool) -> Any:
    """Return values, or lists of values, as text."""
    kind = pa.large_list(pa.large_string()) if per_event else pa.large_string()
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"a column of context holds {column.type}; it must hold "
            f"{'lists of ' if per_event else ''}text or numbers",
            code="data.wrong_type",
        ) from error


def read_context(
    tables: Sequence[Any],
    columns: Sequence[ContextColumn],
    start: Int64[np.ndarray, " R1"],
    names: str,
    *,
    max_history: int,
) -> Context | None:
    """Read the context of the rows of some tables; None without columns.

    Values without a token are unknown, and a warning counts them.

    Args:
        tables: tables of the files of a split.
        columns: columns with the values that have tokens.
        start: whole history of row r: `start[r] : start[r + 1]`.
        names: names of the files, for messages.
        max_history: number of last items of each history that are kept.

    Raises:
        DataError: a column is missing, holds something else, or has lists of another length than
            the histories.
    """
    if not columns:
        return None
    event = np.full((int(start[-1]), sum(c.per_event for c in columns)), UNKNOWN, np.int64)
    row = np.full((len(start) - 1, len(columns) - event.shape[1]), UNKNOWN, np.int64)
    bounds = np.cumsum([0, *(len(table) for table in tables)])
    places = {True: 0, False: 0}
    for column in columns:
        place = places[column.per_event]
        places[column.per_event] += 1
        for table, (low, high) in zip(tables, pairwise(bounds.tolist()), strict=True):
            part = start[low : high + 1]
            if not column.per_event:
                source = _text(_source(table, column.name, names), per_event=False)
                row[low:high, place] = _numbers(source, column, names)
                continue
            of_part = slice(int(part[0]), int(part[-1]))
            lists = f"history_{column.name}"
            if column.name == GAP and lists not in table.column_names:
                event[of_part, place] = gap_numbers(_gaps(table, part - part[0], names))
            else:
                source = _text(_source(table, lists, names), per_event=True)
                known = _aligned(source, part, lists, names)
                event[of_part, place][known] = _numbers(source.flatten(), column, names)
    return Context(event=ragged.last(event, start, max_history)[0], row=row)


def _aligned(
    lists: Any, start: Int64[np.ndarray, " R1"], name: str, names: str
) -> Int64[np.ndarray, " H"]:
    """Return the places of the events of the rows that have a list.

    Raises:
        DataError: a list has another length than the history.
    """
    length = lists.value_lengths().fill_null(-1).to_numpy()
    count = np.diff(start)
    wrong = (length >= 0) & (length != count)
    if wrong.any():
        bad = int(np.argmax(wrong))
        raise DataError(
            f"row {bad} of {names} has {length[bad]} values in `{name}` and {count[bad]} items in "
            f"`history` ({int(wrong.sum())} such rows); give one value for each item",
            code="data.context_length",
        )
    return np.flatnonzero(np.repeat(length >= 0, count))


def _numbers(text: Any, column: ContextColumn, names: str) -> Int64[np.ndarray, " N"]:
    """Return the numbers of values; a warning counts those without a token."""
    index = pc.index_in(text, value_set=pa.array(column.values, pa.large_string()))
    without = pc.and_(pc.is_valid(text), pc.is_null(index))
    if (count := int(pc.sum(without).as_py() or 0)) > 0:
        first = text[pc.index(without, True).as_py()].as_py()
        _log.warning(
            "%d of %d values of `%s` in %s have no token, such as %r; the policy reads them as %s",
            count, len(text), column.name, names, first, column.tokens[UNKNOWN],
        )  # fmt: skip
    return index.fill_null(-1).to_numpy().astype(np.int64) + 1


def _gaps(table: Any, start: Int64[np.ndarray, " R1"], names: str) -> Float64[np.ndarray, " H"]:
    """Return the seconds from each event to the next one, or to the target; NaN if not known."""
    lists, target = (_source(table, name, names) for name in ("history_timestamp", "timestamp"))
    kind = getattr(lists.type, "value_type", None)
    if kind is None or not all(map(_is_time, (kind, target.type))):
        raise DataError(
            f"`history_timestamp` and `timestamp` of {names} hold {lists.type} and {target.type}; "
            "they must hold lists of times and times: numbers or timestamps",
            code="data.wrong_type",
        )
    time = np.full(int(start[-1]), np.nan)
    time[_aligned(lists, start, "history_timestamp", names)] = _seconds(lists.flatten())
    following = np.append(time[1:], np.nan)
    following[start[1:] - 1] = _seconds(target)
    return following - time


def _is_time(kind: Any) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_timestamp(kind)


def _seconds(times: Any) -> Float64[np.ndarray, " N"]:
    """Return times in seconds, NaN where there is none; the unit of numbers is told by their size.

    Numbers up to 4.2e9 are seconds since 1970, larger ones milliseconds and so on.
    """
    is_typed = pa.types.is_timestamp(times.type)
    if is_typed:
        times = times.cast(pa.timestamp("ns")).cast(pa.int64())
    values = times.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if is_typed:
        return values / _PER_SECOND[-1]
    size = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    unit = next((u for u in _PER_SECOND if size < _LAST_SECOND * u), _PER_SECOND[-1])
    return values / unit
