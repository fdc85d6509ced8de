"""Files of all kinds become a data set, or a sentence that says why not."""

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchard.data.importers.examples import PARTS
from orchard.data.importers.read import ImportOptions, format_of, read, size_of
from orchard.data.importers.write import write
from orchard.errors import ConfigError, DataError
from tests.fixtures.logs import bring, csv_file, rows_of, walks


def test_parquet_and_csv_and_recbole_give_the_same_data_set(tmp_path: Path) -> None:
    rows = [(f"u{u}", f"i{i:02}", t) for u, i, t in walks()]
    csv_file(tmp_path / "log.csv", rows)
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))
    table = pa.table({name: list(values) for name, values in columns.items()})
    (tmp_path / "parts").mkdir()
    pq.write_table(table.slice(0, 40), tmp_path / "parts" / "0.parquet")
    pq.write_table(table.slice(40), tmp_path / "parts" / "1.parquet")
    inter = ["user_id:token\titem_id:token\ttimestamp:float"]
    inter += ["\t".join(map(str, (u, i, float(t)))) for u, i, t in rows]
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop.inter").write_text("\n".join(inter))
    keys = sorted({i for _, i, _ in rows})
    titles = ["item_id:token\tmovie_title:token_seq", *(f'{key}\tThe "{key}"' for key in keys)]
    (tmp_path / "shop" / "shop.item").write_text("\n".join(titles))
    for name in ("log.csv", "parts", "shop"):
        bring(tmp_path / name, tmp_path / f"out-{name}")
    first = {part: rows_of(tmp_path / "out-log.csv", part) for part in PARTS}
    for name in ("parts", "shop"):
        assert {part: rows_of(tmp_path / f"out-{name}", part) for part in PARTS} == first
    items = pq.read_table(tmp_path / "out-shop" / "items.parquet").to_pylist()
    assert [row["item_id"] for row in items] == list(range(8))
    assert all(row["title"] == f'The "{row["key"]}"' for row in items)


def test_columns_are_named_and_dates_are_times(tmp_path: Path) -> None:
    rows = [(u, i, f"2024-01-{t // 1000 + 1:02} 00:00:{t % 1000:02}") for u, i, t in walks()]
    source = csv_file(tmp_path / "log.csv", rows, header="who,what,when")
    named = {"user": "who", "item": "what", "timestamp": "when"}
    facts = bring(source, tmp_path / "out", columns=named)
    plain = bring(csv_file(tmp_path / "plain.csv", walks()), tmp_path / "plain")
    assert facts == plain
    targets = [
        [row["target"] for row in rows_of(tmp_path / name, "test")] for name in ("out", "plain")
    ]
    assert targets[0] == targets[1]


def test_context_of_the_events_and_their_times_are_kept_beside_the_histories(
    tmp_path: Path,
) -> None:
    walked = walks()
    rows = [(u, i, t, "" if n % 5 == 0 else f"b{n % 3}") for n, (u, i, t) in enumerate(walked)]
    source = csv_file(tmp_path / "log.csv", rows, header="user_id,item_id,timestamp,kind")
    bring(source, tmp_path / "out", context={"behavior": "kind", "gap": ""})
    bring(csv_file(tmp_path / "plain.csv", walked), tmp_path / "plain")
    of_event = {(t, u): kind or None for u, _, t, kind in rows}
    times = {u: sorted(t for v, _, t in walked if v == u) for u, _, _ in walked}
    for part in PARTS:
        for row, plain in zip(
            rows_of(tmp_path / "out", part), rows_of(tmp_path / "plain", part), strict=True
        ):
            assert {name: row[name] for name in plain} == plain
            earlier = [
                (t, u) for u, each in times.items() if row["timestamp"] in each for t in each
            ]
            kinds = [of_event[t, u] for t, u in earlier if t in row["history_timestamp"]]
            assert len(row["history_behavior"]) == len(row["history"])
            assert max(row["history_timestamp"]) < row["timestamp"]
            assert row["history_behavior"] == kinds
    with pytest.raises(DataError, match="no `color`"):
        bring(source, tmp_path / "other", context={"shade": "color"})


def amazon_files(folder: Path, *, zipped: bool) -> tuple[Path, Path]:
    """Ten users who reviewed seven items each, and one item without a usable title."""
    reviews = [
        {"reviewerID": f"A{u}", "asin": f"B{(u + e) % 9}", "unixReviewTime": 1000 * e + u,
         "style": {"Color:": "red"} if u % 2 else "plain", "reviewText": "fine, thanks"}
        for u in range(10) for e in range(7)
    ]  # fmt: skip
    about = [
        {"asin": f"B{i}", "title": f"Item &amp; <b>part</b> {i}", "price": i} for i in range(8)
    ]
    about += [{"asin": "B8", "title": "word " * 21}, {"asin": "B3", "title": "another edition"}]
    paths = tuple(folder / f"{n}.json{'.gz' * zipped}" for n in ("reviews", "meta"))
    for path, lines in zip(paths, (reviews, about), strict=True):
        text = "\n".join(json.dumps(line) for line in lines).encode()
        path.write_bytes(gzip.compress(text) if zipped else text)
    return paths[0], paths[1]


@pytest.mark.parametrize("zipped", [False, True])
def test_amazon_reviews_are_cut_to_titled_items_and_their_core(
    tmp_path: Path, zipped: bool
) -> None:
    reviews, about = amazon_files(tmp_path, zipped=zipped)
    read_bytes: list[int] = []
    examples = read(reviews, about, ImportOptions(), read_bytes.append)
    assert 0 < sum(read_bytes) <= size_of(reviews, about)
    facts = write(tmp_path / "out", examples, source="reviews", overwrite=False)
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert sorted(row["key"] for row in items) == [f"B{i}" for i in range(8)]
    assert all(row["title"] == f"Item & part {row['key'][1:]}" for row in items)
    assert facts["events_of_items_without_a_usable_title"] == 7
    assert facts["num_events"] == 63
    assert facts["items_without_title"] == 0


def test_reviews_of_2023_are_read_too(tmp_path: Path) -> None:
    lines = [
        {"user_id": f"A{u}", "parent_asin": f"B{(u + e) % 6}", "timestamp": 10**12 + 1000 * e + u}
        for u in range(6) for e in range(6)
    ]  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    about = [{"parent_asin": f"B{i}", "title": f"T {i}", "details": {"a": i}} for i in range(6)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, about)))
    facts = bring(tmp_path / "r.jsonl", tmp_path / "out", tmp_path / "m.jsonl")
    assert facts["num_events"] == 36


def plain(folder: Path, text: str, name: str = "log.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def without_weights(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


HEAD = "user_id,item_id,timestamp\n"
BROKEN: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "a short row": (lambda f: plain(f, HEAD + "1,2,3\n4,5\n"), "Row #3: Expected 3 columns"),
    "no such column": (
        lambda f: plain(f, "uid,sku,ts\n1,2,3\n"),
        r"has the columns uid, sku, ts but no `user_id`; .* --column user=NAME",
    ),
    "no user": (lambda f: plain(f, HEAD + "1,2,3\n,5,6\n"), "row 3 of log.csv has no user"),
    "no item": (lambda f: plain(f, HEAD + "1,2,3\n1, ,6\n"), "row 3 of log.csv has no item"),
    "no time": (lambda f: plain(f, HEAD + "1,2,3\n1,4,\n"), "row 3 of log.csv has no time"),
    "no date": (
        lambda f: plain(f, HEAD + "1,2,3\n1,3,4\n1,2,soon\n1,2,4\n"),
        "row 4 of log.csv has the time 'soon'",
    ),
    "no finite time": (lambda f: plain(f, HEAD + "1,2,3\n1,4,nan\n"), "row 3 .* has the time nan"),
    "two columns of a name": (
        lambda f: plain(f, "user_id,item_id,timestamp,item_id\n1,2,3,4\n"),
        "has two columns `item_id`",
    ),
    "one interaction": (
        lambda f: plain(f, HEAD + "1,2,3\n2,2,3\n"),
        "each of the 2 users has one interaction",
    ),
    "too few": (lambda f: plain(f, HEAD + "1,2,3\n1,3,4\n"), "leave none for train"),
    "no rows": (lambda f: plain(f, HEAD), "holds no interactions"),
    "empty": (lambda f: plain(f, ""), "its first line must name the columns"),
    "no Parquet": (lambda f: plain(f, "text", "log.parquet"), "not readable as Parquet"),
    "another kind": (lambda f: plain(f, "x", "log.xlsx"), "convert it to one"),
    "an empty folder": (without_weights, "holds neither"),
    "nothing": (lambda f: f / "nothing.csv", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_used_is_refused_in_a_sentence_and_nothing_is_written(
    case: str, tmp_path: Path
) -> None:
    make, message = BROKEN[case]
    with pytest.raises(DataError, match=message):
        bring(make(tmp_path), tmp_path / "out")
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_items_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", walks())
    items = csv_file(
        tmp_path / "items.csv", [(50, "Lamp"), (51, "Tent"), (50, "Rug")], "item_id,title"
    )
    with pytest.raises(DataError, match="item 50 is listed twice, as 'Lamp' and as 'Rug'"):
        bring(source, tmp_path / "out", items)
    items = csv_file(
        tmp_path / "items.csv", [(50, "Lamp"), (51, ""), (50, "Lamp")], "item_id,title"
    )
    assert bring(source, tmp_path / "out", items)["items_without_title"] == 7
    with pytest.raises(DataError, match="has a title of 1 to 3 words"):
        bring(source, tmp_path / "new", title_words=3)


def test_lines_that_are_no_json_are_refused(tmp_path: Path) -> None:
    reviews, about = amazon_files(tmp_path, zipped=False)
    with pytest.raises(ConfigError, match="give the metadata with --items"):
        bring(reviews, tmp_path / "out")
    about.write_text("{'asin': 'B1'}")
    with pytest.raises(DataError, match="is not a file of JSON lines"):
        bring(reviews, tmp_path / "out", about)
    about.write_text('{"id": 1}')
    with pytest.raises(DataError, match="has the columns id but no `title`; .*items.title=NAME"):
        bring(reviews, tmp_path / "out", about)


def test_formats_are_told_by_names(tmp_path: Path) -> None:
    for name, kind in {"a.csv": "log", "b.jsonl.gz": "amazon", "c.inter": "recbole"}.items():
        plain(tmp_path, "", name)
        assert format_of(tmp_path / name) == kind
