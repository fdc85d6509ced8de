"""Files of all kinds become a data set, or a sentence that says why not."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard.catalog import catalog as catalogs
from orchard.data.importers.card import CARD, check_leaks
from orchard.data.importers.examples import PARTS, SplitExamples, of_log
from orchard.data.importers.leaks import leaks
from orchard.data.importers.log import InteractionLog, ItemTable, k_core
from orchard.data.importers.read import ImportOptions, format_of, read, size_of
from orchard.data.importers.write import write
from orchard.data.prompts import read_split
from orchard.errors import ConfigError, DataError

Row = tuple[Any, ...]


def bring(
    source: Path, out: Path, items: Path | None = None, **choices: Any
) -> Mapping[str, float]:
    examples = read(source, items, ImportOptions(**choices), lambda count: None)
    return write(out, examples, source=source.name, overwrite=False)


def csv_file(path: Path, rows: Sequence[Row], header: str = "user_id,item_id,timestamp") -> Path:
    path.write_text("\n".join([header, *(",".join(str(cell) for cell in row) for row in rows)]))
    return path


def log_of(rows: Sequence[tuple[int, int, int]]) -> InteractionLog:
    user, item, time = np.array(rows).T
    return InteractionLog(
        user=user,
        item=item,
        timestamp=time,
        user_id=np.arange(user.max() + 1),
        items=ItemTable(item_id=np.arange(item.max() + 1)),
    )


def walks(users: int = 12, events: int = 6, items: int = 8) -> list[tuple[int, int, int]]:
    """Every user walks around the items, all at the same pace; shuffled as logs are."""
    rows = [
        (u + 100, (u + e) % items + 50, 1000 * e + u) for u in range(users) for e in range(events)
    ]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{part}.parquet").to_pylist()


def test_a_log_becomes_splits_that_the_policy_can_read(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", walks())
    facts = bring(source, tmp_path / "out", max_history=3)
    assert facts["num_events"] == 72
    assert [facts[f"{part}_rows"] for part in PARTS] == [48, 6, 6]
    items = catalogs.from_codes([[i] for i in range(8)], item_id=np.arange(50, 58))
    names = pq.read_table(tmp_path / "out" / "items.parquet").column_names
    assert names == ["item_id", "title"]
    for part in PARTS:
        rows = rows_of(tmp_path / "out", part)
        assert len(read_split([tmp_path / "out" / f"{part}.parquet"], items, max_history=9)) == len(
            rows
        )
        for row in rows:  # items follow one another on the walk
            walk = [*row["history"], row["target"]]
            assert all((a - 50 + 1) % 8 == b - 50 for a, b in pairwise(walk))
            assert len(row["history"]) == min(3, row["timestamp"] // 1000)
    times = [row["timestamp"] for part in PARTS for row in rows_of(tmp_path / "out", part)]
    assert times == sorted(times)


def test_leave_one_out_keeps_the_last_two_events_of_each_user(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", [*walks(), (7, 50, 1), (7, 51, 2), (8, 50, 1)])
    facts = bring(source, tmp_path / "out", split="leave_one_out")
    assert [facts[f"{part}_rows"] for part in PARTS] == [12 * 3 + 1, 12, 12]
    assert facts["users_with_one_event"] == 1
    assert {row["user_id"] for row in rows_of(tmp_path / "out", "train")} == {7, *range(100, 112)}
    for row in rows_of(tmp_path / "out", "test"):
        assert len(row["history"]) == 5


def test_equal_histories_with_different_targets_stay_separate(tmp_path: Path) -> None:
    rows = [(user, item, time) for user in range(10) for time, item in enumerate((1, 2 + user))]
    bring(csv_file(tmp_path / "log.csv", rows), tmp_path / "out")
    written = [row for part in PARTS for row in rows_of(tmp_path / "out", part)]
    assert [row["history"] for row in written] == [[1]] * 10
    assert sorted(row["target"] for row in written) == list(range(2, 12))


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


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=1, max_size=60), st.integers(1, 3))
@settings(max_examples=25)
def test_the_core_is_what_dropping_one_by_one_leaves(pairs: list[tuple[int, int]], k: int) -> None:
    left = list(range(len(pairs)))
    while True:
        poor = [
            e for e in left
            if min(sum(pairs[o][side] == pairs[e][side] for o in left) for side in (0, 1)) < k
        ]  # fmt: skip
        if not poor:
            break
        left.remove(poor[0])
    log = log_of([(u, i, t) for t, (u, i) in enumerate(pairs)])
    if not left:
        with pytest.raises(DataError, match="lower --core"):
            k_core(log, k)
        return
    kept = k_core(log, k)
    assert kept.timestamp.tolist() == left
    found = list(zip(kept.user_id[kept.user], kept.items.item_id[kept.item], strict=True))
    assert found == [pairs[e] for e in left]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 9)), min_size=25, max_size=60
    )
)
@example([(0, 0, 0)] * 25)  # a log may list an event many times
@settings(max_examples=25)
@pytest.mark.parametrize("split", ["chronological", "leave_one_out"])
def test_our_splits_never_leak(split: Any, rows: list[tuple[int, int, int]]) -> None:
    log = log_of([*rows, *((u, 0, t) for u in range(4) for t in range(3))])  # enough to split
    assert len(leaks(of_log(log, split=split, max_history=4))) == 0


HEAD_OF_MINIONEREC = (
    "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
)


def minionerec_folder(folder: Path, parts: Mapping[str, Sequence[Row]], items: int = 6) -> Path:
    """Rows of user, history and target, as MiniOneRec's preprocessing writes them."""
    for part, rows in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        lines = [HEAD_OF_MINIONEREC]
        for user, history, target in rows:
            titles = str([f"Item, {i}" for i in history])
            lines.append(f'A{user},"{titles}","Item, {target}","{history}",{target},"[]",x')
        (folder / part / "Shop_5.csv").write_text("\n".join(lines))
    (folder / "index").mkdir(exist_ok=True)
    index = {str(i): [f"<a_{i % 2}>", f"<b_{i // 2}>"] for i in range(items)}
    (folder / "index" / "Shop.index.json").write_text(json.dumps(index))
    about = {str(i): {"title": f"Item, {i}", "description": "x"} for i in range(items)}
    (folder / "index" / "Shop.item.json").write_text(json.dumps(about))
    (folder / "info").mkdir(exist_ok=True)
    lines = [f"<a_{i % 2}><b_{i // 2}>\tItem, {i}\t{i}" for i in range(items)]
    (folder / "info" / "Shop_5.txt").write_text("\n".join(lines))
    return folder


GIVEN: Mapping[str, Sequence[Row]] = {
    "train": [(1, [0], 1), (1, [0, 1], 2), (2, [0], 3)],
    "valid": [(1, [0, 1, 2], 3)],
    "test": [(1, [0, 1, 2, 3], 0), (3, [4], 5)],
}


def test_a_minionerec_folder_keeps_its_splits_items_and_semantic_ids(tmp_path: Path) -> None:
    folder = minionerec_folder(tmp_path / "Amazon", GIVEN)
    bring(folder, tmp_path / "out")
    for part, rows in GIVEN.items():
        found = [(row["history"], row["target"]) for row in rows_of(tmp_path / "out", part)]
        assert found == [(history, target) for _, history, target in rows]
    items = catalogs.read(tmp_path / "out" / "items.parquet")
    assert items.codes.tolist() == [[i % 2, i // 2] for i in range(6)]
    assert items.title[3] == "Item, 3"
    for name in ("Shop.index.json", "Shop.item.json"):  # the info file says the same
        (folder / "index" / name).unlink()
    bring(folder, tmp_path / "again")
    first, again = (pq.read_table(tmp_path / n / "items.parquet") for n in ("out", "again"))
    assert first.equals(again)


def test_an_interaction_of_test_inside_a_training_history_is_refused(tmp_path: Path) -> None:
    leaky = {**GIVEN, "train": [*GIVEN["train"], (3, [4, 5, 1], 2)]}
    folder = minionerec_folder(tmp_path / "Amazon", leaky)
    with pytest.raises(
        DataError, match=r"row 1 of test predicts item 5 .* inside a training history"
    ):
        bring(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    repeated = {**GIVEN, "test": [*GIVEN["test"], (1, [0, 1, 2, 3, 0], 1)]}  # 1 is met once more
    bring(minionerec_folder(tmp_path / "Other", repeated), tmp_path / "out")


def test_time_finds_leaks_of_histories_that_were_cut() -> None:
    examples = of_log(
        log_of([(0, i % 9, i) for i in range(30)]), split="chronological", max_history=4
    )
    check_leaks(examples)
    # A training row that is later than all of test, and holds the four events before it.
    last = int(np.flatnonzero(examples.part == 2)[-1])
    swapped = np.where(np.arange(len(examples)) == last, 0, examples.part)
    leaky = replace(examples, part=swapped)
    assert leaks(leaky).tolist() == [last - 4, last - 3, last - 2, last - 1]


def test_real_splits_do_not_leak(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "amazon_industrial"
    parts: dict[str, list[Row]] = {}
    for part in PARTS:
        rows = pq.read_table(source / f"{part}.parquet").to_pylist()
        rows = [row for row in rows if row.get("history_complete", True)]
        parts[part] = [(row["user_id"], row["history"], row["target"]) for row in rows]
    folder = minionerec_folder(tmp_path / "Amazon", parts, items=3686)
    facts = bring(folder, tmp_path / "out")
    assert (facts["valid_rows"], facts["test_rows"]) == (4532, 4533)
    assert facts["test_targets_in_history"] == pytest.approx(0.028, abs=5e-4)


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
    with pytest.raises(DataError, match="is no file of JSON lines"):
        bring(reviews, tmp_path / "out", about)
    about.write_text('{"id": 1}')
    with pytest.raises(DataError, match="has the columns id but no `title`; .*items.title=NAME"):
        bring(reviews, tmp_path / "out", about)


def test_broken_minionerec_folders_are_refused(tmp_path: Path) -> None:
    folder = minionerec_folder(tmp_path / "Amazon", GIVEN, items=5)
    with pytest.raises(DataError, match="item 5 of a split has no semantic ID"):
        bring(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="leave --items"):
        bring(folder, tmp_path / "out", core=5)
    (folder / "index" / "Shop.index.json").write_text('{"0": ["<b_1>"]}')
    with pytest.raises(DataError, match="must read like"):
        bring(folder, tmp_path / "out")
    (folder / "test" / "Other.csv").write_text("")
    minionerec_folder(folder, GIVEN)
    with pytest.raises(DataError, match=r"must hold one test file .*Other.csv, .*Shop_5.csv"):
        bring(folder, tmp_path / "out")


def test_only_a_data_set_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    source = csv_file(tmp_path / "log.csv", walks())
    bring(source, tmp_path / "out")
    before = (tmp_path / "out" / CARD).read_text()
    with pytest.raises(DataError, match="pass --overwrite"):
        bring(source, tmp_path / "out", max_history=2)
    examples = read(source, None, ImportOptions(max_history=2), lambda count: None)
    write(tmp_path / "out", examples, source="log.csv", overwrite=True)
    assert (tmp_path / "out" / CARD).read_text() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is no data set; choose another folder"):
        write(tmp_path / "mine", examples, source="log.csv", overwrite=True)


def test_formats_are_told_by_names(tmp_path: Path) -> None:
    for name, kind in {"a.csv": "log", "b.jsonl.gz": "amazon", "c.inter": "recbole"}.items():
        plain(tmp_path, "", name)
        assert format_of(tmp_path / name) == kind


def test_examples_know_their_histories() -> None:
    examples: SplitExamples = of_log(
        log_of([(0, i, i) for i in range(12)]), split="chronological", max_history=3
    )
    item, start = examples.history(np.array([0, 4]))
    assert item.tolist() == [0, 2, 3, 4]
    assert start.tolist() == [0, 1, 4]
