"""Convert columns of a table to numbers: identifiers and times, with errors that name the row."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int64

from orchard.data.importers.log import InteractionLog, ItemTable
from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
"""Pattern of integers in canonical form, so that distinct identifiers stay distinct."""


def log_of(
    user: Any, item: Any, timestamp: Any, *, where: str, first: int = 1, title: Any = None
) -> InteractionLog:
    """Build the interaction log of three columns of equal length.

    Args:
        user: any identifiers.
        item: any identifiers.
        timestamp: numbers, dates, or text of either.
        where: name of the file, for error messages.
        first: number of the first row in error messages.
        title: title of each event's item, if the log has titles; an item's first title counts.

    Raises:
        DataError: no rows, or a row without user, item or time.
    """
    if len(user) == 0:
        raise DataError(f"{where} holds no interactions; at least one user needs two")
    user_index, users = _encoded(user, "user", where, first)
    item_index, keys = _encoded(item, "item", where, first)
    times = _times(timestamp, where, first)
    numbers = _integers(keys)
    titles = tuple[str, ...]()
    if title is not None:
        titles = _titles(title, item_index, len(keys))
    items = ItemTable(
        item_id=np.arange(len(keys)) if numbers is None else numbers,
        key=tuple(keys.to_pylist()) if numbers is None else None,
        title=titles,
    )
    user_id = _integers(users)
    user_id = np.arange(len(users)) if user_id is None else user_id
    return InteractionLog(
        user=user_index, item=item_index, timestamp=times, user_id=user_id, items=items
    )


def _encoded(column: Any, role: str, where: str, first: int) -> tuple[Int64[np.ndarray, " E"], Any]:
    """Return the index of each value among the distinct values, and the distinct values as text."""
    if not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    values = column.dictionary.cast(pa.string())
    empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    bad = pc.is_null(column)
    if pc.any(empty).as_py():
        bad = pc.or_(bad, pc.fill_null(empty.take(column.indices), True))
    if pc.any(bad).as_py():
        row = pc.index(bad, True).as_py()
        raise DataError(
            f"row {first + row} of {where} has no {role} ({pc.sum(bad).as_py()} such rows); fill "
            "it in or drop the row"
        )
    return column.indices.to_numpy().astype(np.int64), values


def _integers(text: Any) -> Int64[np.ndarray, " N"] | None:
    """Return the values as integers if all of them are integers, else None."""
    if not pc.all(pc.match_substring_regex(text, _INTEGER)).as_py():
        return None
    return text.cast(pa.int64()).to_numpy()


def _titles(title: Any, item: Int64[np.ndarray, " E"], num_items: int) -> tuple[str, ...]:
    """Return each item's first title that is not empty, or an empty string."""
    titles = pc.fill_null(title.cast(pa.string()), "").combine_chunks()
    filled = pc.not_equal(titles, "").to_numpy(zero_copy_only=False)
    items, first_event = np.unique(item[filled], return_index=True)
    result = [""] * num_items
    texts = titles.filter(pa.array(filled)).take(pa.array(first_event)).to_pylist()
    for row, text in zip(items.tolist(), texts, strict=True):
        result[row] = text
    return tuple(result)


def _times(column: Any, where: str, first: int) -> Int64[np.ndarray, " E"]:
    """Convert times to integers of the same order."""
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(
            f"row {first + row} of {where} has no time ({column.null_count} such rows); fill it in "
            "or drop the row"
        )
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = _parsed(column, where, first)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64()).to_numpy().astype(np.int64)
    values = column.to_numpy()
    if not np.issubdtype(values.dtype, np.number):
        raise DataError(f"the times of {where} are {column.type}; give numbers or dates")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"row {first + bad[0]} of {where} has the time {values[bad[0]]} ({len(bad)} such "
            "rows); correct it or drop the row"
        )
    if np.issubdtype(values.dtype, np.floating) and (values != np.floor(values)).any():
        values = np.floor(values * 1e3)  # fractional seconds: keep the order within a second
    return values.astype(np.int64)


_TRIED = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))


def _parsed(column: Any, where: str, first: int) -> Any:
    """Parse text with the first of the tried types that fits every value."""

    def reads(kind: Any) -> Callable[[Any], bool]:
        def attempt(part: Any) -> bool:
            try:
                part.cast(kind)
            except pa.ArrowInvalid:
                return False
            return True

        return attempt

    for kind in _TRIED:
        if reads(kind)(column):
            return column.cast(kind)
    kinds = [kind for kind in _TRIED if reads(kind)(column.slice(0, 1))] or [_TRIED[0]]
    low, high = 0, len(column)
    while high - low > 1:  # bisect: the first half that cannot be parsed has the first bad row
        middle = (low + high) // 2
        readable = any(reads(kind)(column.slice(low, middle - low)) for kind in kinds)
        low, high = (middle, high) if readable else (low, middle)
    raise DataError(
        f"row {first + low} of {where} has the time {column[low].as_py()!r}, which is no number "
        "and no date like 2024-01-31 12:00:00; correct it or drop the row"
    )
