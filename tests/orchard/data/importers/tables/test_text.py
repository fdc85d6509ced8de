"""Text tables of any encoding, separator, quoting and compression give the same columns."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orchard.data.importers.tables import text
from orchard.data.importers.tables.table import Table, inspect, read_columns
from orchard.errors import ConfigError, DataError

ROWS = [(str(i), f"Café {i}", str(1000 + i)) for i in range(1, 8)]


def written(
    path: Path, separator: str = ",", encoding: str = "utf-8", *, head: bool = True
) -> Path:
    names = [separator.join(("item_id", "title", "timestamp"))] if head else []
    lines = [*names, *(separator.join(row) for row in ROWS)]
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode(encoding))
    return path


def columns(path: Path, *names: str, encoding: str | None = None) -> tuple[Table, list[list[Any]]]:
    table = inspect(path, encoding=encoding)
    parts, _ = read_columns(table, names, names[:1], lambda count: None)
    joined = [
        pa.concat_arrays([c for p in parts for c in p[n].cast(pa.string()).chunks]) for n in names
    ]
    return table, [column.to_pylist() for column in joined]


EXPECTED = [list(column) for column in zip(*ROWS, strict=True)]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "latin-1"]
)
def test_encodings_are_recognized(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "items.csv", encoding=encoding)
    table, found = columns(path, "item_id", "title", "timestamp")
    assert found == EXPECTED
    assert any("a guess" in note for note in table.notes) == (encoding in ("cp1252", "latin-1"))


@pytest.mark.parametrize(
    ("encoding", "word"), [("cp1251", "Лампа"), ("gbk", "台灯很好"), ("shift_jis", "テレビ")]
)
def test_encodings_that_cannot_be_told_apart_must_be_named(
    tmp_path: Path, encoding: str, word: str
) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(
        "\n".join(["item_id,title", *(f"{i},{word} {i}" for i in range(9))]).encode(encoding)
    )
    with pytest.raises(DataError, match="name its encoding with --encoding"):
        inspect(path)
    _, found = columns(path, "item_id", "title", encoding=encoding)
    assert found[1] == [f"{word} {i}" for i in range(9)]
    with pytest.raises(ConfigError, match="--encoding = 'klingon' is not known"):
        inspect(path, encoding="klingon")


def test_an_accent_far_into_the_file_is_recognized(tmp_path: Path) -> None:
    lines = ["item_id,title", *(f"{i},Lamp" for i in range(60_000)), "60000,Café"]
    (tmp_path / "items.csv").write_bytes("\n".join(lines).encode("cp1252"))
    table = inspect(tmp_path / "items.csv")
    parts, notes = read_columns(table, ["item_id", "title"], ["item_id"], lambda count: None)
    assert parts[0]["title"][-1].as_py() == "Café"
    assert "not UTF-8" in notes[0]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.dat"])
def test_separators_are_recognized(tmp_path: Path, separator: str, name: str) -> None:
    table, found = columns(written(tmp_path / name, separator), "item_id", "title", "timestamp")
    assert found == EXPECTED
    assert table.text is not None
    assert table.text.separator == separator


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("suffix", PACKINGS)
def test_packed_tables_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"items.csv{suffix}"
    path.write_bytes(PACKINGS[suffix](written(tmp_path / "plain.csv", ";").read_bytes()))
    assert columns(path, "item_id", "title", "timestamp")[1] == EXPECTED
    path.write_bytes(b"item_id,title\n1,x\n")
    with pytest.raises(DataError, match="is not packed as its suffix"):
        inspect(path)


def test_quoted_line_breaks_beyond_a_block_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BLOCKS", (1 << 10, 1 << 20))
    long = "line, and more\n" * 2000
    rows = [f'{i},"{long if i == 5 else "a" + chr(10) + "b"}",{i}' for i in range(40)]
    (tmp_path / "log.csv").write_text("\n".join(["item_id,title,timestamp", *rows]))
    _, found = columns(tmp_path / "log.csv", "item_id", "title", "timestamp")
    assert found[0] == [str(i) for i in range(40)] == found[2]
    assert found[1][5] == long


def test_a_file_without_a_header_keeps_its_first_row(tmp_path: Path) -> None:
    path = written(tmp_path / "log.csv", head=False)
    table, found = columns(path, "1", "2", "3")
    assert found == EXPECTED
    assert table.first_row == 1
    assert "has no header" in table.notes[-1]
    (tmp_path / "frame.csv").write_text(",0,1\n0,5,6\n1,7,8\n")  # a data frame without names
    assert columns(tmp_path / "frame.csv", "0", "1")[1] == [["5", "7"], ["6", "8"]]


def test_quotes_between_tabs_are_text_unless_they_enclose_cells(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('item_id\ttitle\n1\t"5"" lamp"\n2\t"two\nlines"\n')
    assert columns(tmp_path / "a.tsv", "item_id", "title")[1][1] == ['5" lamp', "two\nlines"]
    (tmp_path / "b.tsv").write_text('item_id\ttitle\n1\t"A" lamp\n2\tx\n')
    assert columns(tmp_path / "b.tsv", "item_id", "title")[1][1] == ['"A" lamp', "x"]


def test_parts_of_a_folder_must_agree(tmp_path: Path) -> None:
    for part in ("a.csv", "b.csv"):
        written(tmp_path / part)
    assert columns(tmp_path, "item_id", "title")[1][0] == 2 * EXPECTED[0]
    (tmp_path / "b.csv").write_text("item_id,name\n1,x\n")
    with pytest.raises(DataError, match="all parts need the same columns"):
        columns(tmp_path, "item_id", "title")
