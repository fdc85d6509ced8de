"""Folders of LC-Rec and LETTER become leave-one-out splits with their semantic IDs."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchard.catalog import catalog as catalogs
from orchard.data.importers.examples import PARTS
from orchard.data.importers.read import ImportOptions, format_of, read
from orchard.data.importers.write import write
from orchard.errors import ConfigError, DataError

SEQUENCES = {"0": [3, 1, 4, 1, 5], "1": [2, 0, 3], "7": [5, 4], "8": [1]}


def lcrec(folder: Path) -> Path:
    (folder / "index").mkdir(parents=True, exist_ok=True)
    index = {str(i): [f"<a_{i % 2}>", f"<b_{i}>"] for i in range(7)}
    about = {str(i): {"title": f'Lamp {i}, "big"', "description": "x"} for i in range(7)}
    (folder / "index" / "Shop.index.json").write_text(json.dumps(index))
    (folder / "index" / "Shop.item.json").write_text(json.dumps(about))
    (folder / "Shop.inter.json").write_text(json.dumps(SEQUENCES))
    return folder


def test_the_last_two_items_of_each_user_are_held_out(tmp_path: Path) -> None:
    folder = lcrec(tmp_path / "Shop")
    assert format_of(folder) == "lcrec"
    examples = read(folder, None, ImportOptions(), lambda count: None)
    facts = write(tmp_path / "out", examples, source="Shop", overwrite=False)
    found = {
        part: {
            (row["user_id"], *row["history"], row["target"])
            for row in pq.read_table(tmp_path / "out" / f"{part}.parquet").to_pylist()
        }
        for part in PARTS
    }
    assert found == {
        "train": {(0, 3, 1), (0, 3, 1, 4), (7, 5, 4)},
        "valid": {(0, 3, 1, 4, 1), (1, 2, 0)},
        "test": {(0, 3, 1, 4, 1, 5), (1, 2, 0, 3)},
    }
    assert (facts["num_items"], facts["users_with_one_event"]) == (7, 1)
    items = catalogs.read(tmp_path / "out" / "items.parquet")
    assert items.codes.tolist() == [[i % 2, i] for i in range(7)]
    assert items.title[6] == 'Lamp 6, "big"'


def test_a_folder_before_its_index_has_no_semantic_ids(tmp_path: Path) -> None:
    folder = lcrec(tmp_path / "Shop")
    (folder / "index" / "Shop.index.json").unlink()
    examples = read(folder, None, ImportOptions(), lambda count: None)
    assert examples.items.sid is None
    assert examples.items.title[6] == 'Lamp 6, "big"'


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = lcrec(tmp_path / "Shop")
    with pytest.raises(ConfigError, match="without times; leave"):
        read(folder, None, ImportOptions(split="chronological"), lambda count: None)
    with pytest.raises(DataError, match="is one file of an LC-Rec"):
        format_of(folder / "Shop.inter.json")
    for sequences, message in (
        ({"0": [9, 1, 2]}, "item 9 of a split has no semantic ID"),
        ({"0": "1 2 3"}, "user 0 of .* has 1 2 3"),
        ({}, "holds no interactions"),
        ([1], "holds a list"),
    ):
        (folder / "Shop.inter.json").write_text(json.dumps(sequences))
        with pytest.raises(DataError, match=message):
            read(folder, None, ImportOptions(), lambda count: None)
