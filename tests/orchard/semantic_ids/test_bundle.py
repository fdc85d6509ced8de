"""The folder of a tokenizer bundle: versions, digests, damage, two appends at once."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; `make env` brings it")

from orchard.errors import DataError
from orchard.semantic_ids import bundle
from orchard.semantic_ids.bundle import Bundle, Description
from orchard.semantic_ids.item_table import ItemTable
from orchard.semantic_ids.projection import Projection
from orchard.semantic_ids.title_encoder import TitleEncoder

DESCRIPTION = Description(
    source="titles",
    origin="titles, TF-IDF and SVD",
    dimensions=3,
    least_length=0.1,
    quantiser="kmeans",
    collisions="reassign",
    level_size=(4, 5),
)
TITLES = ["red oak table", "blue oak table", "red steel drill", "blue steel drill", "oak drill"]


def items(ids: list[int], *, version: int = 1) -> ItemTable:
    draw = np.random.default_rng(ids[0])
    sid = np.stack([draw.integers(4, size=len(ids)), draw.integers(5, size=len(ids))], axis=1)
    return ItemTable(
        item_id=np.array(ids),
        quantized=sid,
        sid=sid,
        prior=np.arange(len(ids), dtype=np.float64),
        distance=draw.random(len(ids), dtype=np.float32),
        nearest=draw.random(len(ids), dtype=np.float32),
        version=np.full(len(ids), version),
    )


def written(folder: Path) -> Bundle:
    draw = np.random.default_rng(0)
    layers = tuple(
        (draw.standard_normal(shape, dtype=np.float32), np.ones(shape[0], dtype=np.float32))
        for shape in ((6, 3), (2, 6))
    )
    projection = Projection(mean=np.ones(3, dtype=np.float32), scale=0.3, layers=layers)
    books = tuple(draw.standard_normal((size, 2), dtype=np.float32) for size in (4, 5))
    encoder = TitleEncoder.fit(TITLES, dimensions=3, seed=0)
    bundle.write(folder, DESCRIPTION, projection, books, items([9, 4, 7]), {"a": 1}, encoder)
    return Bundle.open(folder)


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = written(tmp_path / "sids")
    again = Bundle.open(tmp_path / "sids", version=1)
    assert again.description == DESCRIPTION
    assert again.digest == made.digest
    points = np.random.default_rng(1).standard_normal((5, 3), dtype=np.float32)
    assert (again.projection(points) == made.projection(points)).all()
    assert [book.shape for book in again.books] == [(4, 2), (5, 2)]
    assert again.table.digest == items([9, 4, 7]).digest
    row, is_known = again.table.lookup(np.array([7, 5, 9]))
    assert is_known.tolist() == [True, False, True]
    assert row[is_known].tolist() == [2, 0]
    fitted = TitleEncoder.fit(TITLES, dimensions=3, seed=0)
    assert again.titles is not None
    unseen = [*TITLES, "red oak drill", "zzz"]
    assert (again.titles.embed(unseen) == fitted.embed(unseen)).all()
    assert (again.titles.embed(unseen[3:4]) == fitted.embed(unseen)[3:4]).all()
    assert not fitted.embed(["zzz"]).any()


def test_titles_of_characters_are_read_as_they_were_written(tmp_path: Path) -> None:
    encoder = TitleEncoder.fit(["abc", "bcd", "赤い", "赤い椅子", "!?"], dimensions=3, seed=0)
    assert list(encoder.vectorizers) == ["words", "characters"]
    text, arrays = encoder.to_state()
    again = TitleEncoder.from_state(text, arrays)
    unseen = ["abcd", "い椅", "?", ""]
    assert (again.embed(unseen) == encoder.embed(unseen)).all()


def test_an_append_is_the_next_version_and_leaves_the_ones_before(tmp_path: Path) -> None:
    first = written(tmp_path / "sids")
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    second = bundle.append(first, items([1, 30], version=2), {"added": 2})
    third = bundle.append(second, items([2], version=3), {"added": 1})
    assert bundle.versions(first.folder) == [1, 2, 3]
    assert Bundle.open(first.folder).digest == third.digest
    assert third.table.item_id.tolist() == [9, 4, 7, 1, 30, 2]
    assert (third.table.sid[:3] == first.table.sid).all()
    old = Bundle.open(first.folder, version=1)
    assert (old.digest, old.table.digest) == (first.digest, first.table.digest)
    assert before.items() <= {p.name: p.read_bytes() for p in first.folder.iterdir()}.items()
    tree = json.loads((first.folder / "bundle-3.json").read_text())
    assert (tree["parent"], tree["num_added"], tree["num_items"]) == (second.digest, 1, 6)
    with pytest.raises(DataError, match="has no version 4; choose from 1, 2, 3"):
        Bundle.open(first.folder, version=4)


def test_of_appends_at_once_one_is_written_and_the_others_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path / "sids")
    start, results = threading.Barrier(4), list[Any]()

    def append(item: int) -> None:
        start.wait()
        try:
            results.append(bundle.append(first, items([item], version=2), {}).table.item_id[-1])
        except DataError as error:
            results.append(str(error))

    threads = [threading.Thread(target=append, args=(item,)) for item in (100, 101, 102, 103)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if isinstance(result, str)]
    assert len(refused) == 3
    assert all("another command appended version 2" in message for message in refused)
    won = next(result for result in results if not isinstance(result, str))
    assert Bundle.open(first.folder).table.item_id.tolist() == [9, 4, 7, won]
    assert len(list(first.folder.glob("items-2-*"))) == 1
    assert not list(first.folder.glob(".*"))


@pytest.mark.parametrize("name", ["codebooks.safetensors", "titles.json", "items-1-*.parquet"])
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "sids").folder
    path = next(iter(folder.glob(name)))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"{path.name} is damaged or was changed; copy the bundle"):
        Bundle.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is missing"):
        Bundle.open(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(DataError, match="holds no tokenizer bundle"):
        Bundle.open(tmp_path / "nothing")
    folder = written(tmp_path / "sids").folder
    path = folder / "bundle-1.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"format": 9}))
    with pytest.raises(DataError, match="has format 9, this version of Orchard reads up to 1"):
        Bundle.open(folder)
    path.write_text(json.dumps(tree | {"table": "0"}))
    with pytest.raises(DataError, match="the items of .* are damaged"):
        Bundle.open(folder)
    path.write_text(json.dumps(tree | {"description": {}}))
    with pytest.raises(DataError, match="is damaged: KeyError"):
        Bundle.open(folder)


def test_the_digest_of_a_table_tells_items_and_ids_but_not_their_order() -> None:
    table = items([9, 4, 7])
    assert table.take(np.array([2, 0, 1])).digest == table.digest
    assert replace(table, item_id=np.array([9, 4, 8])).digest != table.digest
    moved = table.sid.copy()
    moved[1, 1] += 1
    assert replace(table, sid=moved).digest != table.digest


def test_the_digest_of_an_encoder_is_that_of_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "sub" / "weights").write_text("1")
    assert bundle.digest_of_folder(tmp_path / "a") == bundle.digest_of_folder(tmp_path / "b")
    (tmp_path / "b" / "sub" / "weights").write_text("2")
    assert bundle.digest_of_folder(tmp_path / "a") != bundle.digest_of_folder(tmp_path / "b")
