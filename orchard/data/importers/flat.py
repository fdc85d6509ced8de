"""Interaction logs and item lists as CSV or Parquet, and RecBole's atomic files.

Roles are `user`, `item`, `timestamp` and `title`; a mapping names the column of each.
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
"""Is told how many more bytes were read."""

COLUMNS = {"user": "user_id", "item": "item_id", "timestamp": "timestamp", "title": "title"}
"""The column of each role, unless another is named."""

ATOMIC = (".inter", ".item")
TEXT = (".csv", ".tsv", *ATOMIC)
_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
_BLOCK = 4 << 20


def read_log(path: Path, columns: Mapping[str, str], tick: Tick) -> InteractionLog:
    """The log of a file or of a folder of Parquet parts.

    Raises:
        DataError: no such file, a column that is not there, a broken row, or as `log_of`.
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
    """Identifier and title of each item in a list of items; missing titles are empty.

    A column may be called as in the log or as it is by default.
    """
    found = _names(path)
    columns = {r: n for r, n in columns.items() if r in ("item", "title") and n in found}
    table = read_columns(path, columns, ("item", "title"), (), tick)
    key = table["item"].cast(pa.string()).to_pylist()
    return key, [title or "" for title in table["title"].cast(pa.string()).to_pylist()]


def read_columns(
    path: Path,
    columns: Mapping[str, str],
    needed: Sequence[str],
    wanted: Sequence[str],
    tick: Tick,
) -> Any:
    """A table whose columns are the roles: all that are needed, and what there is of the wanted.

    Raises:
        ConfigError: a role that does not exist.
        DataError: see `read_log`.
    """
    unknown = columns.keys() - COLUMNS.keys()
    if unknown:
        raise ConfigError(
            f"there is no column role {min(unknown)!r}; choose from {', '.join(COLUMNS)}"
        )
    named = {**COLUMNS, **columns}
    plain = _names(path)
    if path.suffix in ATOMIC and "title" not in plain and "title" not in columns:
        named["title"] = next((n for n in plain if n.endswith(("title", "name"))), "title")
    for role in needed:
        if named[role] not in plain:
            raise DataError(
                f"{path} has the columns {', '.join(plain)} but no `{named[role]}`; name the one "
                f"that holds the {role} with --column {role}=NAME"
            )
    roles = [r for r in (*needed, *wanted) if named[r] in plain]
    names = [plain[named[role]] for role in roles]
    if len(set(names)) < len(names):
        raise ConfigError(f"columns {', '.join(names)}: each role needs a column of its own")
    if path.suffix in TEXT:
        table = _read_text(path, names, [named[role] for role in roles], roles, tick)
    else:
        table = _read_parquet(path, names, tick)
    return table.select(names).rename_columns(roles)


def _names(path: Path) -> dict[str, str]:
    """Columns of a file by name; RecBole's carry their type, as in `item_id:token`."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file or a folder that does")
    found = _header(path) if path.suffix in TEXT else _parquet_names(path)
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise DataError(f"{path} has two columns `{twice}`; give each column a name of its own")
    return {name.split(":")[0] if path.suffix in ATOMIC else name: name for name in found}


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
    """Only the named columns, identifiers as a dictionary so that a long log stays small."""
    kinds = {
        name: _DICTIONARY if role in ("user", "item") else pa.string()
        for name, role in zip(names, roles, strict=True)
    }
    parse = csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=False)
    if _delimiter(path) == "\t":
        parse.quote_char = False  # RecBole's text fields hold quotes as they come
    raw = pa.OSFile(str(path))
    try:
        reader = csv.open_csv(
            raw,
            read_options=csv.ReadOptions(block_size=_BLOCK),
            parse_options=parse,
            convert_options=csv.ConvertOptions(
                include_columns=list(names), column_types=kinds, strings_can_be_null=True,
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
    read = 0
    for batch in reader:
        at = raw.tell()
        tick(at - read)
        read = at
        yield batch


def _without_prefix(error: Exception) -> str:
    return str(error).removeprefix("CSV parse error: ").strip()
