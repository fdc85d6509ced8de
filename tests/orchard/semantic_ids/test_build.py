"""Semantic IDs: quantised, balanced, settled, measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; `make env` brings it")

from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError, DataError
from orchard.semantic_ids import rqvae
from orchard.semantic_ids.build import (
    EMBEDDINGS,
    PICTURE,
    QUANTIZERS,
    REPORT,
    SemanticIdConfig,
    build,
)
from orchard.semantic_ids.collisions import (
    POLICIES,
)
from tests.fixtures.points import blobs


def shop(folder: Path, titles: list[str | None]) -> Path:
    folder.mkdir()
    ids = np.arange(len(titles)) + 7
    pq.write_table(pa.table({"item_id": ids, "title": titles}), folder / "items.parquet")
    rows = [[int(ids[i % len(ids)]), int(ids[(i + 1) % len(ids)])] for i in range(60)]
    table = {"history": rows, "target": [int(ids[(i + 2) % len(ids)]) for i in range(60)]}
    pq.write_table(pa.table(table), folder / "train.parquet")
    return folder


TITLES: list[str | None] = [f"{a} {b}" for a in ("red", "blue", "black") for b in "uvwxyz"]


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", QUANTIZERS)
def test_every_quantiser_leaves_the_same_report(
    quantiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rqvae, "_UPDATES", 20)
    folder = shop(tmp_path / "shop", TITLES)
    report = build(folder, SemanticIdConfig(levels=(3, 4), quantiser=quantiser, dimensions=8))
    assert report["recipe"]["quantiser"] == quantiser
    assert len(report["residual"]) == 2
    assert report["after"]["distinct"] == catalogs.read(folder / "items.parquet").trie.num_leaves


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("source", ["titles", "interactions"])
def test_a_data_set_gets_semantic_ids_that_make_a_catalog(
    policy: str, source: Any, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    recipe = SemanticIdConfig(levels=(3, 4), collisions=policy, source=source, dimensions=8)
    report = build(folder, recipe)
    items = catalogs.read(folder / "items.parquet")
    assert items.trie.num_leaves == report["after"]["distinct"]
    assert sorted(items.item_id.tolist()) == list(range(7, 25))
    assert items.title[int(items.rows(np.array([7]))[0])] == "red u"
    vectors = catalogs.read_embeddings(folder / EMBEDDINGS, items)
    assert vectors.shape == (18, report["recipe"]["dimensions"])
    assert json.loads((folder / REPORT).read_text()) == report
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="pass --overwrite to replace them"):
        build(folder, recipe)
    build(folder, recipe, overwrite=True)


@pytest.mark.slow
def test_embeddings_of_ones_own_are_taken_by_identifier(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    np.save(tmp_path / "e.npy", points)
    order = np.random.default_rng(0).permutation(18)
    table = {"item_id": order + 7, "embedding": list(points[order])}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    tables: list[Any] = []
    for name in ("e.npy", "e.parquet"):
        build(folder, SemanticIdConfig(levels=(2, 4), embeddings=tmp_path / name), overwrite=True)
        tables.append(pq.read_table(folder / "items.parquet"))
    assert tables[0].equals(tables[1])


def test_what_cannot_be_embedded_is_refused_and_the_folder_stays_as_it_was(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", [*TITLES[:-1], None])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    points = blobs(per=2)[:18]
    np.save(tmp_path / "few.npy", points[:17])
    np.save(tmp_path / "nan.npy", np.where(np.arange(18)[:, None] == 5, np.nan, points))
    few = pa.table({"item_id": np.arange(17) + 7, "embedding": list(points[:17])})
    pq.write_table(few, tmp_path / "few.parquet")
    np.save(tmp_path / "words.npy", np.array([["a"]] * 18))
    (tmp_path / "junk.npy").write_text("junk")
    twice = pa.table({"item_id": [7, *range(7, 25)], "embedding": list(points[[0, *range(18)]])})
    pq.write_table(twice, tmp_path / "twice.parquet")
    words = pa.table({"item_id": np.arange(18) + 7, "embedding": ["a"] * 18})
    pq.write_table(words, tmp_path / "words.parquet")
    (tmp_path / "model").mkdir()
    small = {"levels": (2, 2)}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({**small, "source": "titles"}, DataError, "item row 17 has no title"),
        ({**small, "embeddings": tmp_path / "few.npy"}, DataError, r"\(17, 8\) for 18 items"),
        ({**small, "embeddings": tmp_path / "few.parquet"}, DataError, "item 24 has no embedding"),
        ({**small, "embeddings": tmp_path / "nan.npy"}, DataError, "item row 5 in .* not finite"),
        ({**small, "embeddings": tmp_path / "no.npy"}, DataError, "does not exist"),
        ({**small, "embeddings": tmp_path / "junk.npy"}, DataError, "is not an array of numbers"),
        ({**small, "embeddings": tmp_path / "words.npy"}, DataError, "save real numbers"),
        ({**small, "embeddings": tmp_path / "words.parquet"}, DataError, "as a list of numbers"),
        ({**small, "embeddings": tmp_path / "twice.parquet"}, DataError, "item 7 has several"),
        ({**small, "model": tmp_path / "model"}, ConfigError, "holds no config.json"),
        ({"levels": (256,)}, DataError, "lower --levels"),
        ({"levels": (1, 4)}, ConfigError, "at least 2 codes"),
        ({"levels": (4,) * 9}, ConfigError, "has 9 codebooks, at most 8"),
        ({**small, "quantiser": "magic"}, ConfigError, "choose from kmeans, balanced, rqvae"),
        ({**small, "collisions": "pray"}, ConfigError, "choose from extra_level, reassign, keep"),
    ]
    for recipe, kind, message in cases:
        with pytest.raises(kind, match=message):
            build(folder, SemanticIdConfig(**recipe))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no weights"):
        build(folder, SemanticIdConfig(levels=(2, 2), model=tmp_path / "model"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_rows_without_identifiers_stay_with_their_items_when_those_are_reordered(
    suffix: str, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    path = tmp_path / f"e.{suffix}"
    if suffix == "npy":
        np.save(path, points)
    elif suffix == "npz":
        np.savez(path, points)
    else:
        torch.save(torch.from_numpy(points), path)
    rng = np.random.default_rng(1)
    target = rng.choice(np.arange(7, 25), 200, p=rng.dirichlet(np.ones(18)))
    rows = {"history": [[7]] * 200, "target": target}
    pq.write_table(pa.table(rows), folder / "train.parquet")
    recipe = SemanticIdConfig(levels=(2, 4), embeddings=path, collisions="keep")
    found: list[tuple[list[int], dict[int, list[int]]]] = []
    for _ in range(3):
        build(folder, recipe, overwrite=True)
        table = pq.read_table(folder / "items.parquet").to_pydict()
        found.append((table["item_id"], dict(zip(table["item_id"], table["sid"], strict=True))))
        vectors = catalogs.read_embeddings(
            folder / EMBEDDINGS, catalogs.read(folder / "items.parquet")
        )
        assert (vectors == points[np.array(table["item_id"]) - 7]).all()
    assert found[0][0] != list(range(7, 25))  # the items were put in another order
    assert found[0] == found[1] == found[2]
    for file in (folder / "items.parquet", None):  # a run reads the file the same way
        read = catalogs.read_embeddings(path, catalogs.read(folder / "items.parquet"), items=file)
        if file is not None:
            assert (read == points[np.array(found[0][0]) - 7]).all()
    np.save(tmp_path / "other.npy", points + 1)  # in which order is it?
    other = SemanticIdConfig(levels=(2, 4), embeddings=tmp_path / "other.npy", collisions="keep")
    with pytest.raises(DataError, match="have no identifiers, and .* was put in another order"):
        build(folder, other, overwrite=True)


@pytest.mark.slow
def test_items_without_signal_are_counted_and_bounded(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", TITLES)
    points = blobs(per=2)[:18]
    points[:4] = 0
    np.save(tmp_path / "e.npy", points)
    recipe = {"levels": (2, 4), "embeddings": tmp_path / "e.npy"}
    with pytest.raises(
        DataError, match=r"of 4 of 18 items carry no information .* such as item 7; at most 20%"
    ):
        build(folder, SemanticIdConfig(**recipe))
    report = build(folder, SemanticIdConfig(**recipe, max_without_signal=0.25))
    assert (report["items_without_signal"], report["items_sharing_an_embedding"]) == (4, 4)
