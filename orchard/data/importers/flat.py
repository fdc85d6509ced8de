"""Read interaction logs and item lists from tables: text, JSON lines, Parquet, RecBole's files.

Table -> columns of roles -> identifiers, times and titles -> InteractionLog
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from orchard.data.importers.columns import Encoded, encode, first_titles, negative_labels
from orchard.data.importers.log import InteractionLog, ItemTable
from orchard.data.importers.roles import Choice, check_roles, choose
from orchard.data.importers.tables.table import Table, Tick, inspect, read_columns
from orchard.data.importers.times import parse
from orchard.errors import ConfigError, DataError

Labels = Literal["positive", "all"]
_CONTEXT = "context "
"""Beginning of the role of a column of context."""
_MOST_SHARE = 0.2
"""Largest share of events without user or item that is dropped rather than refused."""


@dataclass(frozen=True, kw_only=True)
class LogSource:
    """A log that was found but not read: its table and the columns of the roles."""

    table: Table
    choice: Choice


def find_log(
    path: Path,
    columns: Mapping[str, str],
    *,
    encoding: str | None,
    has_items: bool,
    context: Mapping[str, str] = MappingProxyType({}),
) -> LogSource:
    """Find the columns of a log.

    Args:
        path: file, or folder of parts.
        columns: column of each role that was named.
        encoding: encoding of text; detected if None.
        has_items: whether titles come from an item list, which may have the column of titles.
        context: column of each name of context.

    Raises:
        ConfigError: a role does not exist, or two roles share a column.
        DataError: the file or a column does not exist.
    """
    check_roles(columns)
    table = inspect(path, encoding=encoding)
    named = {role: name for role, name in columns.items() if "." not in role}
    if has_items and named.get("title") not in table.names:
        named.pop("title", None)  # it names the column of the item list
    wanted = ("label",) if has_items and "title" not in named else ("title", "label")
    if "parent_asin" in table.names or "asin" in table.names:
        wanted = ("label",)  # the title of an Amazon review is that of the review
    named |= {f"{_CONTEXT}{name}": column for name, column in context.items()}
    needed = ("user", "item", "timestamp", *(f"{_CONTEXT}{name}" for name in context))
    return LogSource(table=table, choice=choose(table, named, needed, wanted))


def read_log(source: LogSource, labels: Labels | None, tick: Tick) -> InteractionLog:
    """Read the interaction log of a table.

    Args:
        source: the table.
        labels: whether to drop events with a label of 0 or to keep them.
        tick: progress callback.

    Raises:
        ConfigError: events have a label of 0 and `labels` is not given, or the reverse.
        DataError: a row is malformed, or lacks user, item or time.
    """
    table, column = source.table, source.choice.column
    where, first = table.path.name, table.first_row
    names = list(column.values())
    parts, notes = read_columns(table, names, [column["user"], column["item"]], tick)
    if sum(len(part) for part in parts) == 0:
        raise DataError(f"{where} holds no interactions; at least one user needs two")
    user = encode([part[column["user"]] for part in parts], "user", where, first)
    item = encode([part[column["item"]] for part in parts], "item", where, first)
    times = parse([part[column["timestamp"]] for part in parts], where, first)
    said = [*source.choice.notes, *notes, *times.notes]
    title: tuple[str, ...] = ()
    if "title" in column:
        title, said_of_titles = _titles(_joined(parts, column["title"]), item, column["title"])
        said += said_of_titles
    log = InteractionLog(
        user=user.row,
        item=item.row,
        timestamp=times.value,
        user_id=np.arange(len(user.key)) if user.number is None else user.number,
        user_key=user.key if user.number is None else None,
        items=ItemTable(
            item_id=np.arange(len(item.key)) if item.number is None else item.number,
            key=item.key if item.number is None else None,
            title=title,
        ),
        counts=times.counts,
        notes=tuple(said),
        context={
            role.removeprefix(_CONTEXT): np.array(
                [text or None for text in _joined(parts, name).to_pylist()], dtype=object
            )
            for role, name in column.items()
            if role.startswith(_CONTEXT)
        },
    )
    negative = _negative(parts, column.get("label"), labels, where)
    if negative is not None:
        log = log.keep(~negative, "events_with_label_0")
    return _without_missing(log, where)


def _joined(parts: list[Any], name: str) -> Any:
    """Return the column of all parts as text."""
    columns = [part[name].cast(pa.string()) for part in parts]
    return pa.chunked_array([chunk for c in columns for chunk in c.chunks], pa.string())


def _titles(column: Any, item: Encoded, name: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the titles of the items, none if they are not titles of items."""
    title, several = first_titles(column, item.row, len(item.key))
    titled = sum(bool(text) for text in title)
    if several > 0.5 * titled:
        return (), [
            f"`{name}` differs between the events of {several} of {titled} items; it is not taken "
            "for their title"
        ]
    said = [f"{several} items have several titles; the first is taken"] if several else []
    return title, said


def _negative(
    parts: list[Any], name: str | None, labels: Labels | None, where: str
) -> np.ndarray | None:
    """Return the events to drop because their label is 0, or None if there are none."""
    if name is None:
        if labels is not None:
            raise ConfigError(
                f"--labels is given, but {where} has no column of labels; name it with --column "
                "label=NAME, or leave --labels out"
            )
        return None
    negative = negative_labels(_joined(parts, name), where)
    if labels == "all" or not negative.any():
        return None
    if labels is None:
        raise ConfigError(
            f"column `{name}` of {where} is 0 in {int(negative.sum())} of {len(negative)} rows, "
            "which were perhaps shown but not chosen; pass --labels positive to drop them, or "
            "--labels all to keep them"
        )
    return negative


def _without_missing(log: InteractionLog, where: str) -> InteractionLog:
    """Drop the events whose user or item is NaN, and count them."""
    missing = {"user": log.user < 0, "item": log.item < 0}
    role = max(missing, key=lambda name: int(missing[name].sum()))
    dropped = missing["user"] | missing["item"]
    if dropped.mean() > _MOST_SHARE:
        raise DataError(
            f"{int(dropped.sum())} of {len(log)} rows of {where} have no {role} (NaN); a log "
            f"names the {role} of nearly every event: fill them in, or drop these rows"
        )
    log = log.keep(log.user >= 0, "events_without_user") if missing["user"].any() else log
    return log.keep(log.item >= 0, "events_without_item") if (log.item < 0).any() else log
