"""Read fields of JSON lines as text, whatever their types."""

import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from orchard.data.importers.tables.source import IDENTIFIERS, Tick, open_stream, sample
from orchard.errors import DataError

_LINES = 1000
"""Number of lines whose fields name the columns of a file."""
_SAMPLE = 1 << 22


def fields_of(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the fields of the first lines, and the type of those that hold no single values."""
    data, _ = sample(path, _SAMPLE)
    lines = data.decode("utf-8-sig", errors="replace").split("\n")
    if len(data) >= _SAMPLE and len(lines) > 1:
        lines.pop()  # it may be cut
    names: dict[str, None] = {}
    nested: dict[str, str] = {}
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        raise DataError(
            f"{path.name} is one JSON array instead of JSON lines; write one object per line"
        )
    for number, line in enumerate(lines[:_LINES], 1):
        if not line.strip():
            continue
        for name, value in _object(line, number, path).items():
            names.setdefault(name)
            if isinstance(value, list | dict):
                nested[name] = "lists" if isinstance(value, list) else "objects"
    return tuple(names), nested


def _object(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            return value
        problem = f"it is {type(value).__name__}, not an object"
    except ValueError as error:
        problem = str(error)
    raise DataError(
        f"{path.name} is not a file of JSON lines: line {number} cannot be read ({problem}); write "
        "one object per line; Amazon's files of 2014 are Python dictionaries, take those of 2018 "
        "or 2023"
    )


def read(file: Path, names: Sequence[str], encoded: Sequence[str], tick: Tick) -> Any:
    """Read fields as text; numbers keep their digits, and missing fields are null."""
    data, packed = sample(file, _SAMPLE)
    bytes_per_row = packed / max(1, data.count(b"\n"))
    size, done = file.stat().st_size, 0
    columns: dict[str, list[Any]] = {name: [] for name in names}
    schema = pa.schema([(n, IDENTIFIERS if n in encoded else pa.string()) for n in names])
    try:
        # One schema for all lines: fields of other types become text, others are not read.
        with _readable(file) as path:
            frame = pl.scan_ndjson(path, schema=dict.fromkeys(names, pl.String))
            for batch in frame.collect_batches():
                for name in names:
                    text = batch[name].to_arrow().cast(pa.string())
                    columns[name].append(text.dictionary_encode() if name in encoded else text)
                step = min(int(len(batch) * bytes_per_row), size - done)
                tick(step)
                done += step
    except (pl.exceptions.PolarsError, OSError) as error:
        _name_bad_line(file)
        raise DataError(f"{file.name} is not a file of JSON lines: {error}") from error
    tick(size - done)
    return pa.table(
        [pa.chunked_array(columns[name], schema.field(name).type) for name in names], schema=schema
    )


@contextmanager
def _readable(file: Path) -> Generator[Path]:
    """Yield a file in a packing that Polars reads: the file itself, or an unpacked copy."""
    if file.suffix.lower() not in (".bz2", ".xz"):
        yield file
        return
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as copy:
        stream, _ = open_stream(file)
        while data := stream.read(_SAMPLE):
            copy.write(data)
        copy.flush()
        yield Path(copy.name)


def _name_bad_line(file: Path) -> None:
    """Raise the DataError of the first line that is not a JSON object."""
    stream, _ = open_stream(file)
    rest, number = b"", 0
    while True:
        data = stream.read(_SAMPLE)
        *lines, rest = (rest + data).split(b"\n") if data else ([rest, b""])
        for line in lines:
            number += 1
            if line.strip():
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError:
                    raise DataError(
                        f"line {number} of {file.name} is not UTF-8; convert the file to it"
                    ) from None
                _object(text, number, file)
        if not data:
            return
