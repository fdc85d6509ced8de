"""Read columns of text tables in blocks, of any encoding, separator and compression."""

import csv as builtin_csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv

from orchard.data.importers.tables.source import (
    IDENTIFIERS,
    TextLayout,
    Tick,
    guess_encoding,
    open_stream,
)
from orchard.errors import DataError

_BLOCKS = (8 << 20, 256 << 20, (2 << 30) - (1 << 20))
"""Sizes of blocks to try; a row must fit into one."""


def read(
    file: Path,
    layout: TextLayout,
    all_names: Sequence[str],
    names: Sequence[str],
    encoded: Sequence[str],
    tick: Tick,
) -> tuple[Any, list[str]]:
    """Read columns of a text table; a larger block or another encoding is tried where it fails."""
    notes: list[str] = []
    encoding, block = layout.encoding, 0
    done = 0

    def forward(count: int) -> None:  # what a second attempt reads again is not counted
        nonlocal done
        seen_before, done = done, done + count
        tick(max(0, done - max(seen_before, most)))

    most = 0
    while True:
        try:
            return _attempt(
                file, layout, encoding, _BLOCKS[block], all_names, names, encoded, forward
            ), notes
        except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeError, OSError) as error:
            most, done = max(most, done), 0
            message = str(error).removeprefix("CSV parse error: ").strip()
            if "straddl" in message and block + 1 < len(_BLOCKS):
                block += 1
            elif encoding == "utf-8" and ("UTF8" in message or isinstance(error, UnicodeError)):
                encoding = guess_encoding(file)
                if encoding == "utf-8":
                    raise DataError(f"{file.name}: {message}; correct the file") from error
                notes.append(
                    f"{file.name} is not UTF-8; read as Western European (cp1252), a guess"
                )
            else:
                message = _bad_row(file, layout, encoding) or message
                raise DataError(
                    f"{file.name}: {message}; correct the row (the first line is row 1), of which "
                    f"the columns {', '.join(names)} are read"
                ) from error


def _attempt(
    file: Path,
    layout: TextLayout,
    encoding: str,
    block: int,
    all_names: Sequence[str],
    names: Sequence[str],
    encoded: Sequence[str],
    tick: Tick,
) -> Any:
    stream, raw = open_stream(file)
    separator = layout.separator
    if separator == "::":
        stream, separator = pa.PythonFile(_Unified(stream), mode="r"), "\x1f"
    reader = csv.open_csv(
        stream,
        read_options=csv.ReadOptions(
            block_size=block,
            column_names=list(all_names),
            skip_rows=int(layout.has_header),
            encoding=encoding,
        ),
        parse_options=csv.ParseOptions(
            delimiter=separator,
            quote_char='"' if layout.quoted else False,
            newlines_in_values=layout.quoted,
        ),
        convert_options=csv.ConvertOptions(
            include_columns=list(names),
            column_types={n: IDENTIFIERS if n in encoded else pa.string() for n in names},
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    return pa.Table.from_batches(list(_ticked(reader, raw, tick)), reader.schema)


def _bad_row(file: Path, layout: TextLayout, encoding: str) -> str | None:
    """Return what is wrong with the first row that has too few or too many cells."""
    text = io.TextIOWrapper(open_stream(file)[0], encoding, errors="replace", newline="")
    lines = (line.replace("::", "\x1f") for line in text) if layout.separator == "::" else text
    separator = "\x1f" if layout.separator == "::" else layout.separator
    quoting = builtin_csv.QUOTE_MINIMAL if layout.quoted else builtin_csv.QUOTE_NONE
    reader, line = builtin_csv.reader(lines, delimiter=separator, quoting=quoting), 1
    try:
        for row in reader:
            if row and len(row) != len(layout.names):
                return f"Row #{line}: Expected {len(layout.names)} columns, got {len(row)}"
            line = reader.line_num + 1
    except builtin_csv.Error as error:
        return f"Row #{line}: {error}"
    return None


class _Unified(io.RawIOBase):
    """A stream with double colons replaced by one character, which the reader takes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to about `size` bytes; nothing is left when none are returned."""
        data = self._stream.read(size) if size >= 0 else self._stream.read()
        whole = self._rest + data
        # A colon at the end may be the first of two.
        self._rest = b":" if data and whole.endswith(b":") and not whole.endswith(b"::") else b""
        whole = (whole[:-1] if self._rest else whole).replace(b"::", b"\x1f")
        return whole or (self.read(size) if data else b"")


def _ticked(reader: Any, raw: Any, tick: Tick) -> Iterator[Any]:
    last_position = 0
    for batch in reader:
        position = raw.tell()
        tick(position - last_position)
        last_position = position
        yield batch
