"""Select and concatenate structures of arrays by the axes in their annotations.

A structure of arrays is a dataclass whose array fields have jaxtyping shapes. The first dimension
of a shape names the axis of the field, and metadata in `Annotated` say what else an operation must
do with it:

    start: Annotated[Int64[np.ndarray, " B1"], Starts("T")]     rows of axis T for each row of B
    node: Annotated[Int64[np.ndarray, " C"], Indices("N")]      values index axis N, -1 for none
    cost: Annotated[Cost, Merge(sum_costs)]                     concatenated by a function

`B1` and `B+1` stand for axis B with one more entry. A field may be None, another structure, or a
mapping of arrays. Fields without an axis are kept by a selection, and by a concatenation if they
are equal in all parts.

Shapes:  R selected rows   I rows of codes   L levels
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import NoneType
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Int, Int64

from orchard import ragged

S = TypeVar("S")
_LARGEST_KEY = 1 << 62
"""Bound of the numbers of `row_keys`."""


@dataclass(frozen=True, slots=True)
class Starts:
    """Mark of a field with the start of each row on another, ragged axis, then its length."""

    axis: str


@dataclass(frozen=True, slots=True)
class Indices:
    """Mark of a field whose values index another axis; -1 stands for no index."""

    axis: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Mark of a field without an axis that a function concatenates."""

    function: Callable[[Sequence[Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """Name, axis and marks of a field."""

    name: str
    axis: str | None
    """Axis of the first dimension; None for a field that is no array."""
    starts: str | None = None
    indices: str | None = None
    merge: Callable[[Sequence[Any]], Any] | None = None


def select(structure: S, rows: Int64[np.ndarray, " R"], *, axis: str = "B") -> S:
    """Select rows of an axis, in the given order, with their rows on the ragged axes below it.

    A row may be selected more than once. Indices are those into the new arrays.
    """
    selection = _Selection(index={axis: np.asarray(rows)}, owner={axis: np.arange(len(rows))})
    pending = list(_ragged_axes(structure))
    while ready := [one for one in pending if one[0] in selection.index]:
        for above, below, start in ready:
            index = selection.index[above]
            count = np.diff(start)[index]
            selection.index[below] = ragged.ranges(start[index], count)
            selection.owner[below] = np.repeat(selection.owner[above], count)
            if above == axis:
                selection.shift[below] = ragged.starts(count)[:-1] - start[index]
        pending = [one for one in pending if one[1] not in selection.index]
    return _apply(structure, selection)


def take(structure: S, rows: Int64[np.ndarray, " R"], *, axis: str) -> S:
    """Take rows of one axis and leave the other axes and all indices as they are."""
    changed = {
        f.name: _at(getattr(structure, f.name), rows)
        for f in _describe(type(structure))
        if f.axis == axis and f.starts is None and getattr(structure, f.name) is not None
    }
    return replace(cast(Any, structure), **changed)


def concatenate(parts: Sequence[S]) -> S:
    """Concatenate structures along all their axes; an optional field is None if it is in any."""
    described, first = _describe(type(parts[0])), parts[0]
    # length of each axis in each part
    length = {
        f.axis: [len(getattr(part, f.name)) for part in parts]
        for f in described
        if f.starts is None and all(isinstance(getattr(p, f.name), np.ndarray) for p in parts)
    }
    changed = dict[str, Any]()
    for f in described:
        values = [getattr(part, f.name) for part in parts]
        if f.merge is not None:
            changed[f.name] = f.merge(values)
        elif any(value is None for value in values):
            changed[f.name] = None
        elif is_dataclass(values[0]):
            changed[f.name] = concatenate(values)
        elif f.starts is not None:
            changed[f.name] = ragged.starts(np.concatenate([np.diff(v) for v in values]))
        elif f.indices is not None:
            offset = np.cumsum([0, *length[f.indices][:-1]])
            moved = [np.where(v < 0, v, v + o) for v, o in zip(values, offset, strict=True)]
            changed[f.name] = np.concatenate(moved)
        elif isinstance(values[0], Mapping):
            names = cast(Mapping[str, np.ndarray], values[0])
            changed[f.name] = {n: np.concatenate([v[n] for v in values]) for n in names}
        elif f.axis is not None:
            changed[f.name] = np.concatenate(values)
        else:
            assert all(v == values[0] for v in values), f"{f.name} differs between the parts"
    return replace(cast(Any, first), **changed)


def map_arrays(structure: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every array of a structure and of the structures in it."""
    changed = dict[str, Any]()
    for f in _describe(type(structure)):
        value = getattr(structure, f.name)
        if value is None:
            continue
        if f.axis is not None:
            changed[f.name] = function(value)
        elif is_dataclass(value):
            changed[f.name] = map_arrays(value, function)
    return replace(structure, **changed)


def row_keys(codes: Int[np.ndarray, "I L"]) -> Int64[np.ndarray, " I"]:
    """Return a number for each row, equal for equal rows, ascending in their order.

    Codes are -1 past the end of shorter rows. Only numbers of one call compare.
    """
    key, bound = np.zeros(len(codes), dtype=np.int64), 1
    for column in codes.T:
        size = int(column.max(initial=0)) + 2
        if bound > _LARGEST_KEY // size:  # close the gaps between the numbers
            key = np.unique(key, return_inverse=True)[1].reshape(-1).astype(np.int64)
            bound = int(key.max(initial=0)) + 1
        key, bound = key * size + (column.astype(np.int64) + 1), bound * size
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selection:
    """Selected rows of each axis."""

    index: dict[str, np.ndarray]
    """Old index of each new row, by axis."""
    owner: dict[str, np.ndarray]
    """Position among the selected rows that each new row belongs to, by axis."""
    shift: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """New minus old index on an axis, for each of the selected rows."""


def _ragged_axes(structure: Any) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield each axis with an axis below it and the starts, also of the structures within."""
    for f in _describe(type(structure)):
        value = getattr(structure, f.name)
        if f.starts is not None:
            yield cast(str, f.axis), f.starts, value
        elif is_dataclass(value):
            yield from _ragged_axes(value)


def _apply(structure: Any, selection: _Selection) -> Any:
    """Apply a selection to the arrays of a structure and of the structures in it."""
    changed = dict[str, Any]()
    for f in _describe(type(structure)):
        value = getattr(structure, f.name)
        if is_dataclass(value):
            changed[f.name] = _apply(value, selection)
        elif value is None or f.axis not in selection.index:
            continue
        elif f.starts is not None:
            changed[f.name] = ragged.starts(np.diff(value)[selection.index[f.axis]])
        else:
            changed[f.name] = part = _at(value, selection.index[f.axis])
            if f.indices is not None:
                moved = part + selection.shift[f.indices][selection.owner[f.axis]]
                changed[f.name] = np.where(part < 0, part, moved)
    return replace(structure, **changed)


def _at(value: Any, index: Int64[np.ndarray, " R"]) -> Any:
    """Index an array, or each array of a mapping."""
    if isinstance(value, Mapping):
        arrays = cast(Mapping[str, np.ndarray], value)
        return {name: array[index] for name, array in arrays.items()}
    return value[index]


@cache
def _describe(kind: type) -> tuple[_Field, ...]:
    """Read the axes and marks of a structure's fields from its annotations."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_read_field(f.name, hints[f.name]) for f in fields(cast(Any, kind)))


def _read_field(name: str, hint: Any) -> _Field:
    """Read the axis and the marks of an annotation."""
    marks = dict[str, Any]()
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        for mark in metadata:
            if isinstance(mark, Starts):
                marks["starts"] = mark.axis
            elif isinstance(mark, Indices):
                marks["indices"] = mark.axis
            elif isinstance(mark, Merge):
                marks["merge"] = mark.function
    options = [option for option in get_args(hint) if option is not NoneType]
    if not hasattr(hint, "dim_str") and options:  # optional, or the values of a mapping
        hint = options[-1]
    dimensions = str(getattr(hint, "dim_str", "")).split()
    axis = dimensions[0].removesuffix("1").removesuffix("+") if dimensions else None
    return _Field(name=name, axis=axis, **marks)
