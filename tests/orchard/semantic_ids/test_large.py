"""Semantic IDs of more items than are held in memory: a sample, shards, sorted collisions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; `make env` brings it")

from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError, DataError
from orchard.semantic_ids import build, large, rqvae, sampled
from orchard.semantic_ids.build import SemanticIdConfig
from orchard.semantic_ids.bundle import Bundle
from orchard.semantic_ids.encode import EncodeOptions, encode

ITEMS = 500
VECTORS = np.random.default_rng(3).standard_normal((ITEMS, 6)).astype(np.float32)


def shop(folder: Path) -> Path:
    folder.mkdir()
    ids = np.arange(ITEMS)[::-1] + 7
    pq.write_table(pa.table({"item_id": ids}), folder / "items.parquet")
    target = np.random.default_rng(0).choice(ids, 900)
    pq.write_table(pa.table({"history": [[7]] * 900, "target": target}), folder / "train.parquet")
    np.save(folder / "e.npy", VECTORS)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "SHARD", 70)
    monkeypatch.setattr(large, "_BLOCK", 90)
    monkeypatch.setattr(rqvae, "_UPDATES", 20)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [(4, 8), (3, 5, 40), (2, 200)])
@pytest.mark.parametrize(
    ("quantiser", "collisions"),
    [("kmeans", "reassign"), ("kmeans", "extra_level"), ("rqvae", "reassign")],
)
def test_in_parts_and_at_once_give_the_same_ids(
    quantiser: str, collisions: str, levels: tuple[int, ...], tmp_path: Path
) -> None:
    folders = [shop(tmp_path / name) for name in ("whole", "parts")]
    recipe: dict[str, Any] = {
        "levels": levels, "quantiser": quantiser, "collisions": collisions,
    }  # fmt: skip
    whole = build.build(folders[0], SemanticIdConfig(**recipe, embeddings=folders[0] / "e.npy"))
    parts = sampled.build_sampled(
        folders[1], SemanticIdConfig(**recipe, embeddings=folders[1] / "e.npy", sample=ITEMS)
    )
    assert parts["after"] == whole["after"]
    assert parts["before"]["colliding_items"] > 0
    tables = [pq.read_table(folder / "items.parquet") for folder in folders]
    # At once, items that still share an ID are put in the order of popularity.
    assert tables[0].sort_by("item_id").equals(tables[1].sort_by("item_id"))
    bundles = [Bundle.open(folder / "sids") for folder in folders]
    assert bundles[0].table.digest == bundles[1].table.digest
    for name in ("distance", "nearest"):
        found = [getattr(made.table, name) for made in bundles]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert not (folders[1] / sampled.WORK).exists()


@pytest.mark.slow
def test_a_sample_codes_all_items_and_new_ones(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop")
    recipe = SemanticIdConfig(levels=(4, 300), embeddings=folder / "e.npy", sample=320)
    report = sampled.build_sampled(folder, recipe)
    assert (report["after"]["items"], report["after"]["distinct"]) == (ITEMS, ITEMS)
    assert catalogs.read(folder / "items.parquet").trie.num_leaves == ITEMS
    pq.write_table(pa.table({"item_id": [9000, 7]}), folder / "new.parquet")
    np.save(folder / "new.npy", VECTORS[:1])
    options = EncodeOptions(append=True, embeddings=folder / "new.npy")
    again = encode(folder / "sids", folder / "new.parquet", folder / "out.parquet", options)
    assert (again.num_new, again.num_moved, again.version) == (1, 1, 2)


@pytest.mark.slow
def test_an_interrupted_build_goes_on_from_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shop(tmp_path / "shop")
    recipe = SemanticIdConfig(levels=(4, 300), embeddings=folder / "e.npy", sample=320)
    encoded: list[int] = []
    quantize = large.residual_codes

    def counting(points: Any, books: Any) -> Any:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(points))
        return quantize(points, books)

    monkeypatch.setattr(large, "residual_codes", counting)
    with pytest.raises(KeyboardInterrupt):
        sampled.build_sampled(folder, recipe)
    assert "sid" not in pq.read_schema(folder / "items.parquet").names
    monkeypatch.setattr(large, "residual_codes", quantize)
    work = folder / sampled.WORK
    kept = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len([name for name in kept if name.startswith("shard")]) == 3
    monkeypatch.setattr(large, "remove_work", lambda _: None)
    sampled.build_sampled(folder, recipe)
    after = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert kept.items() <= after.items()
    straight = shop(tmp_path / "straight")
    sampled.build_sampled(
        straight, SemanticIdConfig(levels=(4, 300), embeddings=straight / "e.npy", sample=320)
    )
    tables = [pq.read_table(place / "items.parquet") for place in (folder, straight)]
    assert tables[0].equals(tables[1])
    # Other rows are not mixed with the parts of these.
    np.save(folder / "e.npy", VECTORS[::-1])
    sampled.build_sampled(folder, recipe, overwrite=True)
    assert after["key.json"] != (work / "key.json").stat().st_mtime_ns


@pytest.mark.slow
def test_rows_do_not_follow_items_that_were_put_in_another_order(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop")
    recipe = {"levels": (4, 8), "embeddings": folder / "e.npy"}
    build.build(folder, SemanticIdConfig(**recipe))  # with the first order beside it
    before = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    assert before != sorted(before, reverse=True)
    sampled.build_sampled(folder, SemanticIdConfig(**recipe, sample=100), overwrite=True)
    table = pq.read_table(folder / "items.parquet")
    assert table["item_id"].to_pylist() == sorted(before, reverse=True)
    build.build(folder, SemanticIdConfig(**recipe), overwrite=True)
    (folder / "embeddings.parquet").unlink()
    with pytest.raises(DataError, match="were put in another order .* import the data set again"):
        sampled.build_sampled(folder, SemanticIdConfig(**recipe, sample=100), overwrite=True)


def test_what_cannot_be_read_in_parts_is_refused(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop")
    broken = VECTORS.copy()
    broken[333, 2] = np.inf
    np.save(folder / "inf.npy", broken)
    np.save(folder / "few.npy", VECTORS[:9])
    (folder / "junk.npy").write_text("junk")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ConfigError, "--sample needs --embeddings"),
        ({"embeddings": folder / "e.npz"}, DataError, "no .npy file, which --sample maps"),
        ({"embeddings": folder / "few.npy"}, DataError, r"\(9, 6\) for 500 items"),
        ({"embeddings": folder / "junk.npy"}, DataError, "is not an array of numbers"),
        ({"embeddings": folder / "e.npy", "quantiser": "balanced"}, ConfigError, "--quantiser bal"),
        ({"embeddings": folder / "e.npy", "collisions": "keep"}, ConfigError, "--collisions keep"),
        ({"embeddings": folder / "inf.npy"}, DataError, "not finite"),
    ]
    for recipe, kind, message in cases:
        with pytest.raises(kind, match=message):
            sampled.build_sampled(folder, SemanticIdConfig(levels=(4, 8), sample=100, **recipe))
    assert "sid" not in pq.read_schema(folder / "items.parquet").names
