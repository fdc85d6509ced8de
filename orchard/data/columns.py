"""Read optional columns of splits: users, and numbers such as rewards.

Shapes:  R rows
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from orchard.errors import DataError


def numbers_of(tables: Sequence[Any], name: str, names: str) -> Float64[np.ndarray, " R"] | None:
    """Return an optional column of numbers, 1 in tables without it; None if no table has it."""
    if not any(name in table.column_names for table in tables):
        return None
    parts: list[np.ndarray] = []
    for table in tables:
        if name not in table.column_names:
            parts.append(np.ones(len(table)))
            continue
        try:
            parts.append(combined(table[name].cast(pa.float64())).to_numpy(zero_copy_only=False))
        except pa.ArrowInvalid as error:
            raise DataError(f"column `{name}` of {names} must hold numbers: {error}") from error
    values = np.concatenate(parts)
    wrong = ~np.isfinite(values) | ((name == "weight") & (values < 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        least = " and at least 0" if name == "weight" else ""
        raise DataError(
            f"row {row} of {names} has {name} {values[row]} ({int(wrong.sum())} such rows); it "
            f"must be finite{least}",
            code="data.bad_reward",
        )
    return values


def users_of(tables: Sequence[Any], names: str) -> Int64[np.ndarray, " R"]:
    """Return a number per user; users who are not integers are numbered by their first row.

    A row without a user counts as a user of its own, with a negative number.
    """
    users: list[np.ndarray] = []
    texts: list[Any] = []
    for index, table in enumerate(tables):
        alone = -1 - np.arange(len(table)) - (index << 40)
        column = table["user_id"] if "user_id" in table.column_names else None
        if column is None or pa.types.is_null(column.type):
            users.append(alone)
            texts.append(pa.nulls(len(table), pa.string()))
            continue
        kind = column.type
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if pa.types.is_floating(kind):
            column = pa.chunked_array([combined(column).fill_null(float("nan"))])
            column = _whole(column, names)
        elif not (
            pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ):
            raise DataError(
                f"column `user_id` of {names} holds {kind}; it must hold integers or text"
            )
        text = combined(column).cast(pa.string())
        texts.append(text)
        if pa.types.is_integer(column.type):
            present = text.is_valid().to_numpy(zero_copy_only=False)
            users.append(np.where(present, combined(column).fill_null(0).to_numpy(), alone))
    if len(users) == len(tables):  # no text
        return np.concatenate(users).astype(np.int64)
    text = pa.chunked_array(texts).combine_chunks()
    row = text.dictionary_encode().indices
    alone = -1 - np.arange(len(text))
    return np.where(text.is_valid().to_numpy(zero_copy_only=False), row.fill_null(0), alone)


def _whole(column: Any, names: str) -> Any:
    """Return a floating-point column as integers, null where it is NaN."""
    values = column.to_numpy()
    known = ~np.isnan(values)
    if (values[known] != np.floor(values[known])).any() or np.isinf(values).any():
        raise DataError(f"column `user_id` of {names} holds fractions; it must hold integers")
    return pa.chunked_array([pa.array(np.where(known, values, 0).astype(np.int64), mask=~known)])


def combined(column: Any) -> Any:
    """Return the chunks of a column as one array."""
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):  # an empty table has no chunk
        return pa.array([], column.type)
    return combined
