"""Folders of MiniOneRec's preprocessing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchard.catalog import catalog as catalogs
from orchard.data.importers.examples import PARTS
from orchard.errors import ConfigError, DataError
from tests.fixtures.logs import Row, bring, rows_of

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


@pytest.mark.slow
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
