"""JSON lines of any fields are read; what is no line of JSON is named with its number."""

import bz2
import json
from pathlib import Path

import pyarrow as pa
import pytest

from orchard.data.importers.tables.table import inspect, read_columns
from orchard.errors import DataError


def read(path: Path, *names: str) -> list[list[str | None]]:
    parts, _ = read_columns(inspect(path), names, names[:1], lambda count: None)
    return [parts[0][name].cast(pa.string()).to_pylist() for name in names]


def test_fields_of_several_types_become_text(tmp_path: Path) -> None:
    lines = [{"a": 1, "b": "x"}, {"a": "1", "b": None, "c": [1]}, {"b": 12345678901234567890}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\r\n")
    assert read(tmp_path / "x.jsonl", "a", "b") == [
        ["1", "1", None], ["x", None, "12345678901234567890"]
    ]  # fmt: skip
    with pytest.raises(DataError, match="column `c` of .* holds lists"):
        read(tmp_path / "x.jsonl", "c")
    (tmp_path / "x.json.bz2").write_bytes(bz2.compress((tmp_path / "x.jsonl").read_bytes()))
    assert read(tmp_path / "x.json.bz2", "a") == [["1", "1", None]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]', "is one JSON array"),
        ('{"a": 1}\n{a: 2}', "line 2 cannot be read"),
        ('{"a": 1}\n' * 2000 + "{'a': 1}\n", "line 2001 cannot be read"),
        ('{"a": 1}\n[1]\n', "line 2 cannot be read .*list, not an object"),
    ],
)
def test_what_is_no_json_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.json", "a")
