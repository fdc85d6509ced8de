"""Read the titles of a log's items from a list of items, and match the two by identifier.

The column of identifiers is found by name and, where that one matches nothing, by its values.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchard.data.importers.columns import canonical
from orchard.data.importers.flat import LogSource
from orchard.data.importers.log import InteractionLog, with_titles
from orchard.data.importers.roles import described, known_column, no_column
from orchard.data.importers.tables.table import Table, Tick, inspect, read_columns
from orchard.errors import DataError

_TAG = re.compile(r"<[^>]*>")
_AMAZON = ("asin", "parent_asin")
_LEAST_DISTINCT = 0.5
"""Least share of distinct titles in a column that was chosen by a similar name."""
_LEAST_MATCHED = 0.5
"""Least share of the log's items that a column must name to be chosen by its values."""


def attach_titles(
    log: InteractionLog,
    source: LogSource,
    path: Path,
    columns: Mapping[str, str],
    tick: Tick,
    *,
    encoding: str | None,
    required: bool,
) -> InteractionLog:
    """Attach the titles of an item list to the items of a log.

    Args:
        log: the log.
        source: where the log was read from.
        path: the item list: text, JSON lines or Parquet.
        columns: column of each role that was named.
        tick: progress callback.
        encoding: encoding of text; detected if None.
        required: whether a list without titles is an error.

    Raises:
        DataError: the list cannot be read, has no titles though they are required, names an item
            twice, or names none of the log's items.
    """
    table = inspect(path, encoding=encoding)
    title = _title_column(table, columns, required=required)
    if title is None:
        note = f"{described(table, [], ())}; no column holds titles, so items have none"
        return replace(log, notes=(*log.notes, note))
    named = _id_column(table, columns, source.choice.column["item"], title)
    known = set(log.items.names())
    column = named
    ids, titles, notes = _read(table, named, title, tick) if named else ([], [], ())
    guess = f" (a guess: it is not `{source.choice.column['item']}`)" * (
        named is not None and named != source.choice.column["item"] and "items.item" not in columns
    )
    if not known.intersection(ids):
        column = None if "items.item" in columns else _by_values(table, title, known, tick)
        if column is None:
            raise _nothing_matches(log, source, table, named, ids)
        ids, titles, notes = _read(table, column, title, lambda count: None)
        guess = " (a guess: its values are those of the log)"
    assert column is not None
    from_amazon = table.kind == "json" and any(name in table.names for name in _AMAZON)
    if from_amazon:
        titles = [" ".join(_TAG.sub(" ", unescape(text)).split()) for text in titles]
    said = [f"item from `{column}`{guess}", f"title from `{title}`"]
    if title != "title" and title not in columns.values():
        said[1] += " (a guess)"
        distinct = len(set(titles)) / max(1, len(titles))
        if distinct < _LEAST_DISTINCT and len(titles) > 1:
            note = (
                f"{described(table, said[:1], (column,))}; `{title}` has {len(set(titles))} "
                f"different values for {len(titles)} items, which are not titles; name the column "
                "of titles with --column items.title=NAME"
            )
            return replace(log, notes=(*log.notes, note, *notes))
    matched = len(known.intersection(ids))
    note = (
        f"{described(table, said, (column, title))}; {matched} of the log's {len(known)} items are "
        "listed"
    )
    counts = (
        {"log_items_not_in_the_item_list": len(known) - matched} if matched < len(known) else {}
    )
    return replace(
        log,
        items=with_titles(log.items, ids, titles, first_counts=from_amazon),
        notes=(*log.notes, note, *table.notes, *notes),
        counts={**log.counts, **counts},
    )


def _title_column(table: Table, columns: Mapping[str, str], *, required: bool) -> str | None:
    named = columns.get("items.title") or columns.get("title")
    if named is not None and (named in table.names or "items.title" in columns or required):
        if named not in table.names:
            raise no_column(table, "items.title", named)
        return named
    taken = [name for role, name in columns.items() if role in ("item", "items.item")]
    found = known_column(table, "title", taken=taken)
    if found is None and required:
        raise no_column(table, "items.title", "title")
    return found


def _id_column(table: Table, columns: Mapping[str, str], log_column: str, title: str) -> str | None:
    """Return the column of identifiers by its name, or None if no name is known."""
    named = columns.get("items.item")
    if named is not None:
        if named not in table.names:
            raise no_column(table, "items.item", named)
        return named
    if log_column in table.names and log_column != title:
        return log_column
    known = known_column(table, "item", taken=(title,))
    if known is not None:
        return known
    return next((name for name in table.names if name.lower() == "id"), None)


def _read(
    table: Table, column: str, title: str, tick: Tick
) -> tuple[Sequence[str], Sequence[str], tuple[str, ...]]:
    """Return the identifiers and titles of the rows that have an identifier."""
    parts, notes = read_columns(table, [column, title], [column], tick)
    ids, titles = _texts(parts, column), _texts(parts, title)
    ids = canonical(ids)
    rows = [(i, t or "") for i, t in zip(ids.to_pylist(), titles.to_pylist(), strict=True) if i]
    return [i for i, _ in rows], [" ".join(t.split()) for _, t in rows], notes


def _texts(parts: Sequence[Any], name: str) -> Any:
    chunks = [chunk for part in parts for chunk in part[name].cast(pa.string()).chunks]
    joined = pa.chunked_array(chunks, pa.string()).combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def _by_values(table: Table, title: str, known: set[str], tick: Tick) -> str | None:
    """Return the one column whose values are distinct and name most of the log's items."""
    found: list[tuple[int, str]] = []
    for name in table.names:
        if name == title or name in table.nested:
            continue
        try:
            parts, _ = read_columns(table, [name], [name], tick)
        except DataError:
            continue  # bytes or structures
        values = [value for value in canonical(_texts(parts, name)).to_pylist() if value]
        distinct = set(values)
        matched = len(known & distinct)
        if len(distinct) == len(values) and matched >= _LEAST_MATCHED * len(known):
            found.append((matched, name))
    found.sort(reverse=True)
    if len(found) > 1 and found[0][0] == found[1][0]:
        return None  # undecided
    return found[0][1] if found else None


def _nothing_matches(
    log: InteractionLog, source: LogSource, table: Table, column: str | None, ids: Sequence[str]
) -> DataError:
    own = ", ".join(log.items.names()[:3])
    where = f"column `{source.choice.column['item']}` of {source.table.path.name}, such as {own}"
    if column is None:
        listed = f"{table.path.name} has the columns {', '.join(table.names)}"
        return DataError(
            f"{listed}, none of which holds the identifiers of {where}; name the one that does "
            "with --column items.item=NAME"
        )
    stripped = {i.lstrip("0") for i in ids} & {i.lstrip("0") for i in log.items.names()}
    hint = (
        "; they differ in leading zeros: write both alike"
        if stripped
        else (
            "; name the column of the log's identifiers with --column items.item=NAME, or give "
            "the list that belongs to the log"
        )
    )
    return DataError(
        f"no item of {table.path.name} (column `{column}`, such as {', '.join(ids[:3]) or 'none'}) "
        f"occurs in {where}{hint}"
    )
