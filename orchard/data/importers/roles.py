"""Choose the columns that hold users, items, times, titles and labels.

A name that the caller gives counts first, then the default name, then names that public data sets
use. Every choice that was not asked for is said, and so is every column that is not used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from orchard.data.importers.tables.table import Table
from orchard.errors import ConfigError, DataError

COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "title": "title"}
"""Default column of each role."""
ROLES = (*COLUMNS, "label", "items.item", "items.title")
"""Roles that a column may be named for; the last two are those of the item list."""

_KNOWN: Mapping[str, Sequence[str]] = {
    "user": (
        "userid", "user", "reviewerid", "customerid", "visitorid", "memberid", "accountid",
    ),
    "item": (
        "itemid", "parentasin", "asin", "productid", "businessid", "movieid", "bookid", "gmapid",
        "articleid", "newsid", "videoid", "trackid", "songid", "gameid", "recipeid", "item",
    ),
    "timestamp": (
        "timestamp", "unixreviewtime", "unixtime", "datetime", "createdat", "eventtime", "date",
        "time",
    ),
    "title": (
        "title", "itemtitle", "producttitle", "movietitle", "booktitle", "itemname", "productname",
        "moviename", "bookname", "songtitle", "trackname", "tracktitle", "gamename", "gametitle",
        "videotitle", "articletitle", "newstitle", "businessname", "name", "appname",
    ),
    "label": (
        "label", "click", "clicked", "isclick", "isclicked", "like", "islike", "liked", "purchased",
    ),
}  # fmt: skip
"""Names of public data sets, in the order of preference, in lower case without separators."""
_NO_TITLES = (
    "brand", "category", "categories", "store", "shop", "seller", "user", "author", "artist",
    "publisher", "maker", "manufacturer", "genre", "class", "city", "file", "first", "last", "nick",
    "reviewer", "director", "company", "vendor", "supplier", "host", "state", "country", "color",
    "review", "label", "job", "domain", "type", "group", "section", "department", "column", "index",
)  # fmt: skip
"""Words before `name` or `title` that name something other than the item."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Column of each role in a table."""

    column: Mapping[str, str]
    notes: tuple[str, ...]


def check_roles(columns: Mapping[str, str]) -> None:
    """Raise ConfigError if a role does not exist."""
    unknown = columns.keys() - set(ROLES)
    if unknown:
        raise ConfigError(
            f"there is no column role {min(unknown)!r}; choose from {', '.join(ROLES)}"
        )


def choose(
    table: Table, columns: Mapping[str, str], needed: Sequence[str], wanted: Sequence[str]
) -> Choice:
    """Choose the columns of a table: all `needed` roles, and those of the `wanted` that exist.

    Raises:
        ConfigError: two roles share a column.
        DataError: a needed role has no column, or a column that was named does not exist.
    """
    chosen: dict[str, str] = {}
    said: list[str] = []
    for role in (*needed, *wanted):
        name = columns.get(role)
        if name is not None and name not in table.names:
            raise no_column(table, role, name)
        if name is None:
            name = known_column(table, role, taken=(*chosen.values(), *columns.values()))
        if name is None and role in needed:
            raise no_column(table, role, COLUMNS[role])
        if name is not None:
            chosen[role] = name
            guess = role not in columns and name != COLUMNS.get(role)
            said.append(f"{role} from `{name}`{' (a guess)' if guess else ''}")
    if len(set(chosen.values())) < len(chosen):
        raise ConfigError(
            f"columns {', '.join(chosen.values())}: each role needs a column of its own"
        )
    return Choice(column=chosen, notes=(described(table, said, chosen.values()), *table.notes))


def described(table: Table, said: Sequence[str], used: object) -> str:
    """Return which columns are used as what, and which are ignored."""
    left = [name for name in table.names if name not in tuple(used)]  # type: ignore[arg-type]
    shown = ", ".join(left[:12]) + (f" and {len(left) - 12} more" if len(left) > 12 else "")
    return (
        f"{table.path.name}: {', '.join(said) or 'no column is used'}; ignored: {shown or 'none'}"
    )


def known_column(table: Table, role: str, *, taken: Sequence[str] = ()) -> str | None:
    """Return the column of the default name or of a known name, exact before similar names."""
    default = COLUMNS.get(role)
    if default in table.names and default not in taken:
        return default
    by_name = {plain(name): name for name in reversed(table.names) if name not in taken}
    for known in _KNOWN[role]:
        if known in by_name and by_name[known] not in table.nested:
            return by_name[known]
    if role != "title":
        return None
    similar = [
        name
        for name in by_name.values()
        if plain(name).endswith(("title", "name"))
        and name not in table.nested
        and not any(word in plain(name) for word in _NO_TITLES)
    ]
    titles = [name for name in similar if plain(name).endswith("title")] or similar
    return titles[0] if len(titles) == 1 else None


def plain(name: str) -> str:
    """Return a name in lower case without separators."""
    return "".join(char for char in name.lower() if char.isalnum())


def no_column(table: Table, role: str, name: str) -> DataError:
    """Return the error that a table lacks the column of a role, with the most similar name."""
    near = get_close_matches(name.lower(), [n.lower() for n in table.names], 1, 0.6)
    meant = next((n for n in table.names if near and n.lower() == near[0]), None)
    suggestion = f"; did you mean `{meant}`?" if meant else ""
    hint = ""
    if table.text is not None and not table.text.has_header:
        hint = f" (it has no header; the first row reads {', '.join(table.text.first_row)})"
    return DataError(
        f"{table.path} has the columns {', '.join(table.names)}{hint} but no `{name}`{suggestion}; "
        f"name the one that holds the {role} with --column {role}=NAME"
    )
