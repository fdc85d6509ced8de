"""Item attributes and the filters that compare them.

Shapes:  R rows of the attributes file   I items to filter
"""

import logging
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

_log = logging.getLogger("orchard.serve")
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

    def with_changes(
        self, changes: Mapping[int, Mapping[str, Value]], *, strict: bool = True
    ) -> "Attributes":
        """Return a copy with changed attributes of some items.

        A value must have the type of its column, as it came from the file: a number for a float
        column, a whole number in its range for an integer one, a boolean, or a text; or be null.

        Args:
            changes: changed attributes by item id.
            strict: refuse an attribute that does not exist or a value of another type; such values
                are passed over otherwise, with a warning.

        Raises:
            ConfigError: an attribute does not exist, or a value is not of its column's type.
        """
        merged, passed_over = dict(self.changed), list[str]()
        for item, values in changes.items():
            fitting: dict[str, Value] = {}
            for name, value in values.items():
                problem = self._misfit(name, value)
                if problem is None:
                    fitting[name] = value
                elif strict:
                    raise ConfigError(f"attribute {name} of item {item} {problem}")
                else:
                    passed_over.append(name)
            if fitting:
                merged[item] = {**merged.get(item, {}), **fitting}
        if passed_over:
            _log.warning(
                "%d attribute values of earlier deltas fit no column of serve.attributes and are "
                "ignored: %s", len(passed_over), ", ".join(sorted(set(passed_over))),
            )  # fmt: skip
        return replace(self, changed=merged)

    def _misfit(self, name: str, value: Value) -> str | None:
        """Return why a value cannot be an attribute of that name, None if it can."""
        if name not in self.column:
            known = ", ".join(self.column) or "none"
            return f"is not a column of the attributes; there are {known}"
        if value is None:
            return None
        kind, holds = self.column[name][0].dtype, _HOLDS[self.column[name][0].dtype.kind]
        if isinstance(value, bool):
            fits = kind.kind == "b"
        elif isinstance(value, str):
            fits = kind.kind == "U"
        elif kind.kind in "iu":
            limits = np.iinfo(kind)
            fits = isinstance(value, int) and limits.min <= value <= limits.max
        elif kind.kind == "f":
            # Compared as exact Python numbers: a large integer would overflow a conversion.
            fits = abs(value) <= float(np.finfo(kind).max)
        else:
            fits = False
        return None if fits else f"is {value!r}, but its column holds {holds} ({kind})"


_HOLDS = {
    "b": "booleans", "i": "whole numbers", "u": "whole numbers", "f": "numbers", "U": "text",
}  # fmt: skip
"""Content of a column by the kind of its NumPy type; columns of other kinds are not read."""


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
    used = {by.column for by in filters.values()}
    column: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in table.column_names:
        if name == "item_id":
            continue
        values = _column(table[name].combine_chunks(), order)
        if values is not None:
            column[name] = values
        elif name in used:
            raise ConfigError(
                f"column {name!r} of {path} holds {table[name].type}, which no filter compares; "
                "give it numbers, booleans or text"
            )
    attributes = Attributes(item_id=ids[order], column=column)
    check_filters(attributes, filters)
    return attributes


def check_filters(attributes: Attributes, filters: Mapping[str, FilterConfig]) -> None:
    """Raise ConfigError unless every filter fits the attribute columns."""
    for name, by in filters.items():
        if by.column not in attributes.column:
            raise ConfigError(
                f"serve.filters.{name}.column = {by.column!r} is not a column of serve.attributes; "
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
) -> tuple[Shaped[np.ndarray, " R"], Bool[np.ndarray, " R"]] | None:
    """Return the values of a column and where they are known, both in the given row order.

    NaN counts as unknown, like null. None for a type that filters do not compare.
    """
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    is_known = ~values.is_null().to_numpy(zero_copy_only=False)
    array: np.ndarray
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        array = np.array([value or "" for value in values.to_pylist()], dtype=np.str_)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        array = values.fill_null(pa.scalar(0).cast(kind)).to_numpy(zero_copy_only=False)
    else:
        return None
    if array.dtype.kind == "f":
        is_known = is_known & ~np.isnan(array)
    return array[order], is_known[order]
