"""Item lists are matched with the log by identifier, whatever their columns are called."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchard.data.importers.read import ImportOptions, read
from orchard.data.importers.write import write
from orchard.errors import ConfigError, DataError

LOG = [(u, (u + e) % 6 + 1, 1_600_000_000 + 1000 * e + u) for u in range(9) for e in range(6)]


def log(folder: Path, *, head: str = "user_id,item_id,timestamp", item: str = "{}") -> Path:
    lines = [f"{u},{item.format(i)},{t}" for u, i, t in LOG]
    (folder / "log.csv").write_text("\n".join([head, *lines]))
    return folder / "log.csv"


def listed(folder: Path, head: str, row: str, name: str = "items.csv") -> Path:
    lines = [row.format(i=i) for i in range(1, 7)]
    (folder / name).write_text("\n".join([head, *lines]))
    return folder / name


def titles(folder: Path, source: Path, items: Path | None, **choices: Any) -> tuple[Any, str]:
    examples = read(source, items, ImportOptions(**choices), lambda count: None)
    write(folder / "out", examples, source=source.name, overwrite=True)
    rows = pq.read_table(folder / "out" / "items.parquet").to_pylist()
    return {row.get("key", row["item_id"]): row["title"] for row in rows}, "\n".join(examples.notes)


EXPECTED = {i: f"Lamp {i}" for i in range(1, 7)}


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("id,name", "{i},Lamp {i}"),
        ("code,year,title", "{i},2020,Lamp {i}"),  # found by its values
        ("item_id,code,title", "90{i},{i},Lamp {i}"),  # the usual name matches nothing
        ("item_id,brand_name,movie_title", "{i},ACME,Lamp {i}"),
        ("app_name,id,title", "app,{i},Lamp {i}"),
        ("item_id,title", "{i}.0,Lamp {i}"),
        ("item_id,title", " {i} , Lamp  {i}"),
    ],
)
def test_identifiers_and_titles_are_found(tmp_path: Path, head: str, row: str) -> None:
    found, notes = titles(tmp_path, log(tmp_path), listed(tmp_path, head, row))
    assert found == EXPECTED
    assert "6 of the log's 6 items are listed" in notes


def test_columns_of_the_list_may_be_named_apart_from_those_of_the_log(tmp_path: Path) -> None:
    items = listed(tmp_path, "x,y,z", "{i},9{i},Lamp {i}")
    columns = {"items.item": "x", "items.title": "z"}
    assert titles(tmp_path, log(tmp_path), items, columns=columns)[0] == EXPECTED
    with pytest.raises(DataError, match="no `xx`.*did you mean `x`|no `xx`"):
        titles(tmp_path, log(tmp_path), items, columns={"items.item": "xx"})
    with pytest.raises(DataError, match=r"no item of items.csv \(column `y`, such as 91, 92, 93\)"):
        titles(tmp_path, log(tmp_path), items, columns={"items.item": "y", "items.title": "z"})
    with pytest.raises(ConfigError, match="needs an item list"):
        titles(tmp_path, log(tmp_path), None, columns=columns)


def test_a_list_that_matches_nothing_is_refused_with_examples_of_both(tmp_path: Path) -> None:
    message = (
        r"column `item_id`, such as B1, B2, B3\) occurs in column `item_id` of log.csv, such as 1"
    )
    with pytest.raises(DataError, match=message):
        titles(tmp_path, log(tmp_path), listed(tmp_path, "item_id,title", "B{i},Lamp {i}"))
    with pytest.raises(DataError, match="they differ in leading zeros"):
        titles(tmp_path, log(tmp_path), listed(tmp_path, "item_id,title", "00{i},Lamp {i}"))


@pytest.mark.parametrize("name", ["title=nmae", "title=named"])
def test_a_column_that_is_nowhere_is_refused(tmp_path: Path, name: str) -> None:
    items = listed(tmp_path, "id,name", "{i},Lamp {i}")
    role, _, column = name.partition("=")
    for given in (items, None):
        with pytest.raises(DataError, match=f"but no `{column}`"):
            titles(tmp_path, log(tmp_path), given, columns={role: column})
    with pytest.raises(DataError, match="did you mean `name`"):
        titles(tmp_path, log(tmp_path), items, columns={role: column})


def test_what_names_no_single_item_is_no_title(tmp_path: Path) -> None:
    folder = tmp_path / "rb"
    folder.mkdir()
    rows = "\n".join(f"u{u}\t{i}\t{t}" for u, i, t in LOG)
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "rb.inter").write_text(head + rows)
    for column, values in {"brand_name": "ACME", "class": "A B", "line_name": "ACME"}.items():
        lines = [f"item_id:token\t{column}:token", *(f"{i}\t{values}" for i in range(1, 7))]
        (folder / "rb.item").write_text("\n".join(lines))
        found, notes = titles(tmp_path, folder, None)
        assert found == dict.fromkeys(range(1, 7), "")
        assert "title" in notes
    items = listed(tmp_path, "item_id,brand_name", "{i},ACME")
    with pytest.raises(DataError, match=r"no `title`; .* --column items.title=NAME"):
        titles(tmp_path, log(tmp_path), items)


@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_log_takes_titles_from_json_lines(tmp_path: Path, packed: bool) -> None:
    about = [
        {"parent_asin": f"B{i}", "title": f"Lamp &amp; <b>co</b> {i}", "price": None, "details": {}}
        for i in range(1, 7)
    ] + [{"parent_asin": "B1", "title": "another edition"}]
    text = "\n".join(map(json.dumps, about)).encode()
    path = tmp_path / f"meta.jsonl{'.gz' * packed}"
    path.write_bytes(gzip.compress(text) if packed else text)
    source = log(tmp_path, head="user_id,parent_asin,timestamp", item="B{}")
    assert titles(tmp_path, source, path)[0] == {f"B{i}": f"Lamp & co {i}" for i in range(1, 7)}


def test_json_lines_of_any_fields_are_a_log(tmp_path: Path) -> None:
    lines = [
        {"review_id": n, "user_id": f"u-{u}", "business_id": i, "date": f"2020-09-1{n % 9} 10:00",
         "text": "x", "votes": {"useful": 1}}
        for n, (u, i, _) in enumerate(LOG)
    ]  # fmt: skip
    (tmp_path / "yelp.json").write_text("\n".join(map(json.dumps, lines)))
    about = [{"business_id": i, "name": f"Lamp {i}", "hours": None} for i in range(1, 7)]
    (tmp_path / "about.json").write_text("\n".join(map(json.dumps, about)))
    found, notes = titles(tmp_path, tmp_path / "yelp.json", tmp_path / "about.json")
    assert found == EXPECTED
    assert "item from `business_id` (a guess)" in notes
    assert "ignored: review_id, text, votes" in notes
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    assert users == [{"user_id": u, "key": f"u-{u}"} for u in range(9)]


def test_a_title_that_changes_between_events_is_none_of_the_item(tmp_path: Path) -> None:
    lines = [f"{u},{i},{t},review {n}" for n, (u, i, t) in enumerate(LOG)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp,title", *lines]))
    found, notes = titles(tmp_path, tmp_path / "log.csv", None)
    assert set(found.values()) == {""}
    assert "differs between the events of 6 of 6 items" in notes
