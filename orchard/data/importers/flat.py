"""Read interaction logs and item lists from CSV, Parquet and RecBole's atomic files.

The roles of columns are `user`, `item`, `timestamp` and `title`; a mapping names the column of
each role.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from orchard.data.importers.columns import log_of
from orchard.data.importers.log import InteractionLog
from orchard.errors import ConfigError, DataError

Tick = Callable[[int], None]
"""Progress callback, called with the number of bytes read since the last call."""

COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "title": "title"}
"""Default column of each role."""

ATOMIC = (".inter", ".item")
TEXT = (".csv", ".tsv", *ATOMIC)
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
_BLOCK = 4 << 20


def read_log(path: Path, columns: Mapping[str, str], tick: Tick) -> InteractionLog:
    """Read the interaction log of a file or of a folder of Parquet parts.

    Raises:
        DataError: the file or a column does not exist, a row is malformed, or as `log_of`.
    """
    table = read_columns(path, columns, ("user", "item", "timestamp"), ("title",), tick)
    return log_of(
        table["user"],
        table["item"],
        table["timestamp"],
        where=path.name,
        first=2 if path.suffix in TEXT else 1,  # the header is row 1 of a text file
        title=table["title"] if "title" in table.column_names else None,
    )


def read_titles(
    path: Path, columns: Mapping[str, str], tick: Tick
) -> tuple[Sequence[str], Sequence[str]]:
    """Read the identifier and the title of each item in an item list; missing titles are empty.

    A column may have the name that it has in the log, or its default name.
    """
    available = _names(path)
    columns = {r: n for r, n in columns.items() if r in ("item", "title") and n in available}
    table = read_columns(path, columns, ("item", "title"), (), tick)
    item_ids = table["item"].cast(pa.string()).to_pylist()
    return item_ids, [title or "" for title in table["title"].cast(pa.string()).to_pylist()]


def read_columns(
    path: Path,
    columns: Mapping[str, str],
    needed: Sequence[str],
    wanted: Sequence[str],
    tick: Tick,
) -> Any:
    """Read a table with one column per role: all `needed` roles, and the `wanted` ones that exist.

    Raises:
        ConfigError: a role does not exist, or two roles share a column.
        DataError: see `read_log`.
    """
    unknown = columns.keys() - COLUMNS.keys()
    if unknown:
        raise ConfigError(
            f"there is no column role {min(unknown)!r}; choose from {', '.join(COLUMNS)}"
        )
    name_of_role = {**COLUMNS, **columns}
    available = _names(path)
    if path.suffix in ATOMIC and "title" not in available and "title" not in columns:
        name_of_role["title"] = next(
            (n for n in available if n.endswith(("title", "name"))), "title"
        )
    for role in needed:
        if name_of_role[role] not in available:
            raise DataError(
                f"{path} has the columns {', '.join(available)} but no `{name_of_role[role]}`; "
                f"name the one that holds the {role} with --column {role}=NAME"
            )
    roles = [r for r in (*needed, *wanted) if name_of_role[r] in available]
    names = [available[name_of_role[role]] for role in roles]
    if len(set(names)) < len(names):
        raise ConfigError(f"columns {', '.join(names)}: each role needs a column of its own")
    if path.suffix in TEXT:
        table = _read_text(path, names, [name_of_role[role] for role in roles], roles, tick)
    else:
        table = _read_parquet(path, names, tick)
    return table.select(names).rename_columns(roles)


def _names(path: Path) -> dict[str, str]:
    """Return the columns of a file by name, without RecBole's type suffix (`item_id:token`)."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file or a folder that does")
    headers = _header(path) if path.suffix in TEXT else _parquet_names(path)
    if len(set(headers)) < len(headers):
        duplicate = next(name for name in headers if headers.count(name) > 1)
        raise DataError(f"{path} has two columns `{duplicate}`; give each column a name of its own")
    return {name.split(":")[0] if path.suffix in ATOMIC else name: name for name in headers}


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{path} holds neither *.parquet nor *.index.json nor *.inter; give a log, a folder of "
            "Parquet parts, a RecBole folder or a MiniOneRec folder"
        )
    return files


def _parquet_names(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(_parquet_files(path)[0]).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {error}; write it again") from error


def _read_parquet(path: Path, names: Sequence[str], tick: Tick) -> Any:
    parts: list[Any] = []
    for file in _parquet_files(path):
        try:
            parts.append(pq.read_table(file, columns=list(names)))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file} is not readable as Parquet: {error}; write it again"
            ) from error
        if list(parts[-1].column_names) != list(names):
            raise DataError(
                f"{file} lacks columns of {_parquet_files(path)[0].name}; all parts need "
                f"{', '.join(names)}"
            )
        tick(file.stat().st_size)
    return pa.concat_tables(parts, promote_options="permissive")


def _delimiter(path: Path) -> str:
    return "," if path.suffix == ".csv" else "\t"


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline().rstrip("\r\n")
    if not line:
        raise DataError(f"{path} is empty; its first line must name the columns")
    return [name.strip().strip('"') for name in line.split(_delimiter(path))]


def _read_text(
    path: Path, names: Sequence[str], shown: Sequence[str], roles: Sequence[str], tick: Tick
) -> Any:
    """Read only the named columns, with identifiers dictionary-encoded to save memory."""
    column_types = {
        name: _DICTIONARY if role in ("user", "item") else pa.string()
        for name, role in zip(names, roles, strict=True)
    }
    parse = csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=False)
    if _delimiter(path) == "\t":
        parse.quote_char = False  # RecBole's text fields contain unescaped quotes
    raw = pa.OSFile(str(path))
    try:
        reader = csv.open_csv(
            raw,
            read_options=csv.ReadOptions(block_size=_BLOCK),
            parse_options=parse,
            convert_options=csv.ConvertOptions(
                include_columns=list(names), column_types=column_types, strings_can_be_null=True,
                null_values=[""],
            ),
        )  # fmt: skip
        return pa.Table.from_batches(list(_ticked(reader, raw, tick)), reader.schema)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise DataError(
            f"{path.name}: {_without_prefix(error)}; correct the row (the header is row 1), of "
            f"which the columns {', '.join(shown)} are read"
        ) from error


def _ticked(reader: Any, raw: Any, tick: Tick) -> Iterator[Any]:
    last_position = 0
    for batch in reader:
        position = raw.tell()
        tick(position - last_position)
        last_position = position
        yield batch


def _without_prefix(error: Exception) -> str:
    return str(error).removeprefix("CSV parse error: ").strip()
