"""Encode columns of identifiers, titles and labels as rows of a log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int64

from orchard.errors import DataError

pc: Any = pyarrow.compute  # it generates its functions at import, invisibly to type checkers

_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
"""Pattern of integers in canonical form, so that distinct identifiers stay distinct."""
_WHOLE = r"^(0|-?[1-9][0-9]{0,14})(\.0+)?$"
"""Pattern of integers that passed through floating point, as columns with gaps do."""
_MISSING = r"^(?i:nan|none|null|<na>|n/a)$"
"""Pattern of what data frames write for a missing identifier."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Identifiers as rows of their distinct values."""

    row: Int64[np.ndarray, " E"]
    """Row of each event's identifier; -1 where it is missing."""
    key: tuple[str, ...]
    """Distinct identifiers, in the order of their first event."""
    number: Int64[np.ndarray, " N"] | None
    """The identifiers as integers if all of them are integers."""


def encode(parts: Sequence[Any], role: str, where: str, first: int) -> Encoded:
    """Encode dictionary-encoded identifiers of all parts.

    Raises:
        DataError: a row has no identifier, or one that is a list or an object of JSON.
    """
    chunks = [chunk for part in parts for chunk in part.chunks]
    column = pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.string()))
    column = column.unify_dictionaries().combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    values = canonical(column.dictionary.cast(pa.string()))
    index = column.indices.fill_null(-1).to_numpy().astype(np.int64)
    empty = pc.fill_null(pc.equal(values, ""), True).to_numpy(zero_copy_only=False)
    bad = np.append(empty, True)[index]
    if bad.any():
        raise DataError(
            f"row {first + int(np.argmax(bad))} of {where} has no {role} ({int(bad.sum())} such "
            "rows); fill it in or drop the row"
        )
    nested = pc.match_substring_regex(values, r"^[\[{].*[\]}]$")
    if pc.any(nested).as_py():
        example = values.filter(nested)[0].as_py()
        raise DataError(
            f"{where} has the {role} {example[:60]!r}; an identifier is one number or one text"
        )
    # Distinct values of the canonical form, in the order of their first event, without the missing.
    distinct = values.dictionary_encode()
    missing = pc.match_substring_regex(distinct.dictionary, _MISSING)
    kept = pc.invert(missing).to_numpy(zero_copy_only=False)
    row_of_value = np.where(kept, np.cumsum(kept) - 1, -1)[distinct.indices.to_numpy()]
    keys = distinct.dictionary.filter(pc.invert(missing))
    return Encoded(row=row_of_value[index], key=tuple(keys.to_pylist()), number=integers(keys))


def canonical(text: Any) -> Any:
    """Return identifiers without surrounding spaces, and `12.0` as `12` if all are whole numbers.

    Identifiers that differ in leading zeros stay distinct.
    """
    text = pc.utf8_trim_whitespace(text)
    present = text.filter(pc.invert(pc.fill_null(pc.match_substring_regex(text, _MISSING), True)))
    present = present.filter(pc.not_equal(present, ""))
    if len(present) and pc.all(pc.match_substring_regex(present, _WHOLE)).as_py():
        return pc.replace_substring_regex(text, r"\.0+$", "")
    return text


def integers(text: Any) -> Int64[np.ndarray, " N"] | None:
    """Return the values as integers if all of them are integers, else None."""
    if not pc.all(pc.match_substring_regex(text, _INTEGER)).as_py():
        return None
    return text.cast(pa.int64()).to_numpy()


def first_titles(
    title: Any, item: Int64[np.ndarray, " E"], num_items: int
) -> tuple[tuple[str, ...], int]:
    """Return each item's first title that is not empty, and how many items have several."""
    titles = pc.utf8_trim_whitespace(pc.fill_null(title.cast(pa.string()), "")).combine_chunks()
    filled = pc.not_equal(titles, "").to_numpy(zero_copy_only=False) & (item >= 0)
    items, first_event = np.unique(item[filled], return_index=True)
    result = [""] * num_items
    kept = titles.filter(pa.array(filled))
    texts = kept.take(pa.array(first_event)).to_pylist()
    for row, text in zip(items.tolist(), texts, strict=True):
        result[row] = text
    code = kept.dictionary_encode().indices.to_numpy().astype(np.int64)
    pairs = np.unique(np.stack([item[filled], code]), axis=1)
    several = int((np.unique(pairs[0], return_counts=True)[1] > 1).sum())
    return tuple(result), several


def negative_labels(label: Any, where: str) -> Bool[np.ndarray, " E"]:
    """Return which labels are zero or false; raises DataError if one is no number or truth."""
    text = pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(label.cast(pa.string()), "")))
    text = text.combine_chunks()
    zero = pc.match_substring_regex(text, r"^(-?0+(\.0*)?|false|no|f|n)$")
    known = pc.match_substring_regex(text, r"^([-+]?\d+(\.\d*)?|true|false|yes|no|t|f|y|n)$")
    if not pc.all(known).as_py():
        row = pc.index(known, False).as_py()
        raise DataError(
            f"{where} has the label {text[row].as_py()!r}; a label is a number, or true or false"
        )
    return zero.to_numpy(zero_copy_only=False)
