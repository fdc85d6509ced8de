"""Item attributes and the filters that compare them.

Shapes:  R rows of the attributes file   I items to filter
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64, Shaped

from orchard.errors import ConfigError
from orchard.parquet import read_table
from orchard.settings import FilterConfig

Value = bool | int | float | str | None
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
    "in": lambda values, choices: np.isin(values, np.array(choices, dtype=values.dtype)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """Table of item attributes with later changes. Immutable."""

    item_id: Int64[np.ndarray, " R"]
    """Item id of each row, ascending."""
    column: Mapping[str, tuple[Shaped[np.ndarray, " R"], Bool[np.ndarray, " R"]]]
    """Values and their validity mask, by attribute."""
    changed: Mapping[int, Mapping[str, Value]] = field(default_factory=dict[int, Any])
    """Changed attributes by item id; they override the table."""

    def passing(self, item_id: Int[np.ndarray, " I"], by: FilterConfig) -> Bool[np.ndarray, " I"]:
        """Return which items have a known attribute that passes the comparison."""
        values, is_known = self.column[by.column]
        passes = np.zeros(len(item_id), dtype=np.bool_)
        if len(self.item_id):
            # Row of each item in the table, valid where `in_table`.
            row = np.searchsorted(self.item_id, item_id).clip(max=len(self.item_id) - 1)
            in_table = (self.item_id[row] == item_id) & is_known[row]
            passes[in_table] = _COMPARE[by.op](values[row[in_table]], by.value)
        if self.changed:
            order = np.argsort(item_id, kind="stable")
            changed = np.array([i for i, c in self.changed.items() if by.column in c], np.int64)
            # Position in `item_id` of each changed item, or of a neighbor if it is not there.
            position = np.searchsorted(item_id, changed, sorter=order).clip(max=len(order) - 1)
            for index, item in zip(order[position].tolist(), changed.tolist(), strict=True):
                if item_id[index] == item:
                    passes[index] = _passes(self.changed[item][by.column], by)
        return passes

    def with_changes(self, changes: Mapping[int, Mapping[str, Value]]) -> "Attributes":
        """Return a copy with changed attributes of some items.

        Raises:
            ConfigError: an attribute does not exist.
        """
        for item, values in changes.items():
            unknown = sorted(values.keys() - self.column.keys())
            if unknown:
                raise ConfigError(
                    f"attribute {unknown[0]} of item {item} is no column of the attributes; "
                    f"there are {', '.join(self.column) or 'none'}"
                )
        merged = dict(self.changed)
        for item, values in changes.items():
            if values:
                merged[item] = {**merged.get(item, {}), **values}
        return replace(self, changed=merged)


def _passes(value: Value, by: FilterConfig) -> bool:
    """Return whether a single value passes the comparison; null and other types do not."""
    if value is None:
        return False
    try:
        return bool(value in by.value) if by.op == "in" else bool(_COMPARE[by.op](value, by.value))  # type: ignore[operator]
    except TypeError:
        return False


NOTHING = Attributes(item_id=np.zeros(0, np.int64), column={})


def read_attributes(path: Path, filters: Mapping[str, FilterConfig]) -> Attributes:
    """Read all attribute columns of a Parquet file and check the filters against them.

    Raises:
        DataError: the file is missing or unreadable.
        ConfigError: a filter's column is missing or not comparable with its value.
    """
    table = read_table(path, role="attributes", columns=("item_id",), remedy="serve.attributes")
    ids = table["item_id"].to_numpy().astype(np.int64)
    order = np.argsort(ids, kind="stable")
    column = {
        name: _column(table[name].combine_chunks(), order)
        for name in table.column_names
        if name != "item_id"
    }
    attributes = Attributes(item_id=ids[order], column=column)
    check_filters(attributes, filters)
    return attributes


def check_filters(attributes: Attributes, filters: Mapping[str, FilterConfig]) -> None:
    """Raise ConfigError unless every filter fits the attribute columns."""
    for name, by in filters.items():
        if by.column not in attributes.column:
            raise ConfigError(
                f"serve.filters.{name}.column = {by.column!r} is no column of serve.attributes; "
                f"there are {', '.join(attributes.column) or 'none'}"
            )
        if (by.op == "in") != isinstance(by.value, tuple):
            raise ConfigError(
                f"serve.filters.{name}: `in` takes a list of values and nothing else does; "
                f"it has {by.op} {by.value!r}"
            )
        values, _ = attributes.column[by.column]
        is_text = values.dtype.kind == "U"
        operands = by.value if isinstance(by.value, tuple) else (by.value,)
        if any(isinstance(operand, str) != is_text for operand in operands):
            raise ConfigError(
                f"serve.filters.{name}: column {by.column!r} holds "
                f"{'text' if is_text else 'numbers'}, which {by.value!r} cannot be compared with"
            )


def _column(
    values: Any, order: Int64[np.ndarray, " R"]
) -> tuple[Shaped[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
    """Return the values of a column and where they are not null, both in the given row order."""
    is_known = ~values.is_null().to_numpy(zero_copy_only=False)
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    array: np.ndarray
    if is_text:
        array = np.array([value or "" for value in values.to_pylist()], dtype=np.str_)
    else:
        array = values.fill_null(pa.scalar(0).cast(values.type)).to_numpy(zero_copy_only=False)
    return array[order], is_known[order]
