"""Find the columns of a file or a folder of parts, and read some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from orchard.data.importers.tables import json_lines, parquet, text
from orchard.data.importers.tables.source import (
    ATOMIC,
    Kind,
    TextLayout,
    Tick,
    kind_of,
    refuse_type,
    suffix_of,
    text_layout,
)
from orchard.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file, or a folder of parts, with the names of its columns."""

    path: Path
    files: tuple[Path, ...]
    kind: Kind
    names: tuple[str, ...]
    """Names of the columns, without RecBole's type suffix (`item_id:token`)."""
    nested: Mapping[str, str]
    """Type of each column that holds no single values."""
    text: TextLayout | None
    notes: tuple[str, ...]
    encoding: str | None = None
    """Encoding of text that the caller named."""

    @property
    def first_row(self) -> int:
        """Number of the first row in messages: the header of a text file is row 1."""
        return 2 if self.text is not None and self.text.has_header else 1


def inspect(path: Path, *, encoding: str | None = None) -> Table:
    """Find the columns of a file or of a folder of parts.

    Raises:
        ConfigError: there is no such encoding.
        DataError: nothing is there, or it cannot be read as a table.
    """
    files = _files(path)
    kind = kind_of(files[0])
    if kind is None:
        raise DataError(
            f"{files[0].name} is none of *.csv, *.tsv, *.txt, *.dat, *.inter, *.json, *.jsonl, "
            "each also packed as *.gz, nor *.parquet, nor a folder of them; convert it to one"
        )
    layout, nested = None, dict[str, str]()
    if kind == "text":
        layout = text_layout(files[0], encoding)
        names = layout.names
        if suffix_of(files[0]) in ATOMIC:
            names = tuple(name.split(":")[0] for name in names)
    elif kind == "json":
        names, nested = json_lines.fields_of(files[0])
    else:
        schema = parquet.schema_of(files[0])
        names = tuple(schema.names)
        nested = {field.name: str(field.type) for field in schema if pa.types.is_nested(field.type)}
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has two columns `{duplicate}`; give each column a name of its own")
    notes = layout.notes if layout is not None else ()
    if len(files) > 1:
        notes = (f"{path.name} is read from {len(files)} parts, in the order of names", *notes)
    return Table(
        path=path,
        files=files,
        kind=kind,
        names=names,
        nested=nested,
        text=layout,
        notes=notes,
        encoding=encoding,
    )


def read_columns(
    table: Table, names: Sequence[str], encoded: Sequence[str], tick: Tick
) -> tuple[list[Any], tuple[str, ...]]:
    """Read columns of all parts; returns an Arrow table per part, and notes.

    Args:
        table: the table.
        names: columns to read.
        encoded: those of them that are read as dictionary-encoded text: identifiers.
        tick: progress callback.

    Raises:
        DataError: a row or a part cannot be read, or a column holds lists, structures or bytes.
    """
    for name in names:
        if name in table.nested:
            refuse_type(table.path, name, table.nested[name])
    parts: list[Any] = []
    notes: list[str] = []
    for file in table.files:
        if table.kind == "text":
            assert table.text is not None
            layout = table.text
            if file != table.files[0]:
                layout = text_layout(file, table.encoding)
                _same_columns(file, table.files[0], layout.names, table.text.names)
            part, said = text.read(file, layout, table.names, names, encoded, tick)
            notes += said
        elif table.kind == "json":
            part = json_lines.read(file, names, encoded, tick)
        else:
            part = parquet.read(file, names, encoded, table.files[0], tick)
        parts.append(part)
    return parts, tuple(notes)


def _files(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        raise DataError(f"{path} does not exist; give a file or a folder that does")
    if not path.is_dir():
        return (path,)
    inside = sorted(f for f in path.iterdir() if f.is_file() and f.name[0] not in "._")
    for kind in ("parquet", "text", "json"):
        files = tuple(file for file in inside if kind_of(file) == kind)
        if files:
            return files
    raise DataError(
        f"{path} holds neither *.parquet nor *.index.json nor *.inter; give a log, a folder of "
        "parts, a RecBole folder, or a MiniOneRec or LC-Rec folder"
    )


def _same_columns(file: Path, first: Path, names: Sequence[str], expected: Sequence[str]) -> None:
    if tuple(names) != tuple(expected):
        raise DataError(
            f"{file} has the columns {', '.join(names)}, but {first.name} has "
            f"{', '.join(expected)}; all parts need the same columns in the same order"
        )
