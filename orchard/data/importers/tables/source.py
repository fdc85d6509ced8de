"""Detect how a file is packed and laid out: compression, encoding, separator and header.

Whatever is guessed is recorded in `TextLayout.notes`, and what cannot be guessed is refused.
"""

import codecs
import csv
import io
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow as pa

from orchard.errors import ConfigError, DataError

Kind = Literal["text", "json", "parquet"]
Tick = Callable[[int], None]
"""Progress callback, called with the number of bytes read since the last call."""

IDENTIFIERS = pa.dictionary(pa.int32(), pa.string())
"""Type of columns of identifiers."""
ATOMIC = (".inter", ".item")
"""Suffixes of RecBole's files, whose columns are named like `item_id:token`."""
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "pipes", "::": "double colons"}
_SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".psv", *ATOMIC), "text"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}  # type: ignore[assignment]
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_SAMPLE = 1 << 18
_ROWS = 100
_DATUM = re.compile(
    r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?|\d{4}[-/]\d{1,2}[-/]\d{1,2}.*|\d{1,2}[./]\d{1,2}[./]\d{4}.*"
)
"""Pattern of numbers and dates, which no header names a column by."""
_WESTERN = set(
    bytes([0x80, 0x85, *range(0x91, 0x98), 0x99, *range(0xA0, 0xC0), 0xD7]).decode("cp1252")
)
"""Signs that Western European text holds besides letters."""


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """Layout of a text table."""

    encoding: str
    separator: str
    quoted: bool
    names: tuple[str, ...]
    """Names of the columns; their numbers, from 1, if the file has no header."""
    has_header: bool
    first_row: tuple[str, ...]
    """Cells of the first line."""
    notes: tuple[str, ...]
    """Guesses, in words."""


def suffix_of(path: Path) -> str:
    """Return the suffix that names the kind of a file, without that of a compression."""
    name = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return name.suffix.lower()


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a file by its name, or None if the name says nothing."""
    kind = _SUFFIXES.get(suffix_of(path))
    return None if kind == "parquet" and path.suffix.lower() in _PACKED else kind


def open_stream(path: Path) -> tuple[Any, Any]:
    """Open a file for reading what is in it, unpacked; returns that stream and the raw one.

    Raises:
        DataError: the file does not exist, cannot be read, or is an archive.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
        raw = pa.OSFile(str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    packing = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if packing is None and path.suffix.lower() in _PACKED and head:
        raise DataError(
            f"{path} is not packed as its suffix {path.suffix} says; rename it, or pack it again"
        )
    if packing == "zip":
        raise DataError(f"{path} is a zip archive; unpack it and give the file inside")
    if packing == "xz":
        return pa.PythonFile(lzma.LZMAFile(raw), mode="r"), raw
    return (pa.CompressedInputStream(raw, packing) if packing else raw), raw


def sample(path: Path, size: int = _SAMPLE) -> tuple[bytes, int]:
    """Return the first bytes of a file, unpacked, and how many packed bytes they took."""
    stream, raw = open_stream(path)
    try:
        return read_exactly(stream, size), raw.tell()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}; fetch it again") from error


def read_exactly(stream: Any, size: int) -> bytes:
    """Read `size` bytes, or what is left."""
    parts: list[bytes] = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def text_layout(path: Path, encoding: str | None) -> TextLayout:
    """Detect the layout of a text table from its beginning.

    Args:
        path: the file.
        encoding: its encoding; detected if None.

    Raises:
        ConfigError: there is no such encoding.
        DataError: the file is empty, or of an encoding that cannot be guessed.
    """
    data, _ = sample(path)
    notes: list[str] = []
    if encoding is None:
        encoding = _encoding(data, path, is_whole=len(data) < _SAMPLE)
        if encoding == "cp1252":
            notes.append(f"{path.name} is not UTF-8; read as Western European (cp1252), a guess")
    else:
        try:
            encoding = codecs.lookup(encoding).name
        except LookupError as error:
            raise ConfigError(
                f"--encoding = {encoding!r} is not known; give one such as utf-8, cp1252, cp1251, "
                "gbk or shift_jis"
            ) from error
    text = data.decode(encoding, errors="replace").lstrip("\ufeff")
    is_whole = len(data) < _SAMPLE
    if not text.strip():
        raise DataError(f"{path} is empty; its first line must name the columns")
    separator, usual = _separator(text, path, is_whole=is_whole)
    if not usual:
        notes.append(f"the columns of {path.name} are separated by {SEPARATORS[separator]}")
    quoted = _is_quoted(text, separator, path, is_whole=is_whole)
    rows = _rows(text, separator, quoted=quoted, is_whole=is_whole)
    first = tuple(cell.strip().strip('"') for cell in rows[0])
    has_header = _is_header(first)
    names = (
        tuple(name or f"column {i}" for i, name in enumerate(first, 1))
        if has_header
        else tuple(str(i) for i in range(1, len(first) + 1))
    )
    if not has_header:
        notes.append(
            f"{path.name} has no header, its first row reads {separator.join(first)[:80]!r}; "
            f"its columns are numbered 1 to {len(first)}"
        )
    return TextLayout(
        encoding=encoding,
        separator=separator,
        quoted=quoted,
        names=names,
        has_header=has_header,
        first_row=first,
        notes=tuple(notes),
    )


def guess_encoding(path: Path) -> str:
    """Guess the encoding of a file that is not UTF-8, from all of it.

    Raises:
        DataError: the file is not of a Western European encoding either.
    """
    stream, _ = open_stream(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    last = b""
    while data := read_exactly(stream, 1 << 22):
        last = data
        try:
            decoder.decode(data)
        except UnicodeDecodeError:
            return _encoding(data, path, is_whole=True)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:  # the end is half a character
        return _encoding(last, path, is_whole=True)
    return "utf-8"


def _encoding(data: bytes, path: Path, *, is_whole: bool) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if data.startswith(codecs.BOM_UTF8):
        return "utf-8"
    if data[:2000].count(b"\0") > len(data[:2000]) // 4:
        return "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:  # the last character of a sample may be cut
        codecs.getincrementaldecoder("utf-8")().decode(data, final=is_whole)
    except UnicodeDecodeError:
        if _is_western(data):
            return "cp1252"
        raise DataError(
            f"{path} is neither UTF-8 nor Western European text; name its encoding with "
            "--encoding, such as cp1251, cp1250, gbk, shift_jis or euc_kr"
        ) from None
    return "utf-8"


def _is_western(data: bytes) -> bool:
    """Return whether bytes read as Western European text: single accented letters in words."""
    runs = re.findall(rb"[\x80-\xff]+", data)
    total = sum(len(run) for run in runs)
    text = b"".join(runs).decode("cp1252", errors="replace")
    usual = sum((char.isalpha() and char != "ƒ") or char in _WESTERN for char in text)
    long = sum(len(run) for run in runs if len(run) > 2)
    return usual >= 0.9 * total and long <= 0.1 * total


def _separator(text: str, path: Path, *, is_whole: bool) -> tuple[str, bool]:
    """Return the separator of the columns, and whether it is the usual one of the suffix."""
    usual = {".csv": ",", ".tsv": "\t", ".tab": "\t", **dict.fromkeys(ATOMIC, "\t")}.get(
        suffix_of(path)
    )
    if suffix_of(path) in ATOMIC:
        return "\t", True
    widths: dict[str, tuple[bool, int]] = {}
    for separator in sorted(SEPARATORS, key=lambda s: s != usual):
        rows = _rows(text, separator, quoted=separator != "::", is_whole=is_whole)
        width = len(rows[0])
        widths[separator] = (width > 1 and all(len(row) == width for row in rows), width)
    if usual is not None and widths[usual][1] > 1:
        return usual, True
    best = max(widths, key=lambda s: widths[s])  # the first of equals
    return (best, usual in (None, best)) if widths[best][1] > 1 else (usual or ",", True)


def _is_quoted(text: str, separator: str, path: Path, *, is_whole: bool) -> bool:
    """Return whether quotes enclose cells; in tables with tabs they may be part of the text."""
    if separator != "\t":
        return separator != "::"
    if suffix_of(path) in ATOMIC or not re.search(r'(^|\t)"', text, re.MULTILINE):
        return False
    rows = _rows(text, separator, quoted=True, is_whole=is_whole)
    plain = _rows(text, separator, quoted=False, is_whole=is_whole)
    consistent = all(len(row) == len(rows[0]) for row in rows)
    opened = [cell for row in plain for cell in row if cell.startswith('"')]
    return consistent and (
        len(rows) < len(plain)
        or all(
            len(c) > 1 and c.endswith('"') and '"' not in c[1:-1].replace('""', "") for c in opened
        )
    )


def _rows(text: str, separator: str, *, quoted: bool, is_whole: bool) -> Sequence[Sequence[str]]:
    """Return the first rows of a table, without a last one that may be cut."""
    if separator == "::":
        lines = text.splitlines()
        rows = [line.split("::") for line in lines[:_ROWS] if line]
    else:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        rows: list[list[str]] = []
        try:
            rows += (row for row in islice(reader, _ROWS) if row)
        except csv.Error:
            is_whole = True  # a cell longer than the reader takes; what came before it is whole
    return (rows if is_whole or len(rows) < 2 or len(rows) == _ROWS else rows[:-1]) or [[text]]


def _is_header(first: Sequence[str]) -> bool:
    """Return whether a first line names columns: no cell is a number or a date.

    Data frames without names number their columns 0, 1, 2, ..., and leave an index unnamed.
    """
    numbered = [str(i) for i in range(len(first))]
    if list(first) == numbered or list(first) == ["", *numbered[:-1]]:
        return len(first) > 1
    return not any(_DATUM.fullmatch(cell) for cell in first)


def refuse_type(path: Path, name: str, kind: str) -> NoReturn:
    """Raise the DataError of a column that holds lists, structures or bytes."""
    raise DataError(
        f"column `{name}` of {path} holds {kind}; an identifier, a time, a title or a label is "
        "one number or one text: write one row per value, as text or numbers"
    )
