"""Catalogs: valid and refused items, and the promises of a saved one."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import from_codes, load, read, read_embeddings, write
from orchard.errors import CatalogError, DataError
from orchard.testing import tiny_catalog

# A busy machine is no counterexample.
examples = settings(max_examples=40)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.parquet"
    columns = {"item_id": [7, 3, 9], "sid": [[0, 1], [2, 0], [0, 1]], "title": ["a", None, "c"]}
    pq.write_table(pa.table(columns), path)
    return path


def rewrite(path: Path, **columns: object) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, path)


def test_items_are_read_in_file_order_and_looked_up_by_identifier(items: Path) -> None:
    found = read(items)
    assert found.item_id.tolist() == [7, 3, 9]
    assert found.title == ("a", "", "c")
    assert found.level_size == (3, 2)
    assert found.rows(np.array([9, 7])).tolist() == [2, 0]
    assert found.leaf_of_item[0] == found.leaf_of_item[2] != found.leaf_of_item[1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet does not exist"):
        read(tmp_path / "nowhere.parquet")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_text("item_id,sid")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(tmp_path / "items.parquet")


def test_a_missing_column_is_named(items: Path) -> None:
    pq.write_table(pq.read_table(items).drop_columns("sid"), items)
    with pytest.raises(DataError, match="no `sid`"):
        read(items)


@pytest.mark.parametrize("sid", [None, []])
def test_an_item_without_a_semantic_id_is_named(items: Path, sid: list[int] | None) -> None:
    rewrite(items, sid=[[0, 1], sid, [0, 1]])
    with pytest.raises(CatalogError, match=r"item 3 has no semantic ID \(1 of 3 items\)"):
        read(items)


def test_identifiers_are_distinct(items: Path) -> None:
    rewrite(items, item_id=[7, 7, 9])
    with pytest.raises(CatalogError, match="3 items carry 2 distinct identifiers"):
        read(items)


def test_no_items_are_no_catalog() -> None:
    with pytest.raises(CatalogError, match="no items"):
        from_codes([])


def test_depths_differ_only_where_that_is_allowed() -> None:
    with pytest.raises(CatalogError, match=r"row 1 .* depth 1 where 2 was expected"):
        from_codes([[0, 1], [0]])
    assert from_codes([[0, 1], [0]], varying_depth=True).trie.num_leaves == 2


def test_a_sequence_longer_than_the_levels_is_refused() -> None:
    with pytest.raises(CatalogError, match=r"row 0 .* depth 3 where 2 was expected"):
        from_codes([[0, 1, 0]], level_size=(2, 2), varying_depth=True)


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_out_of_range_is_named(code: int) -> None:
    with pytest.raises(CatalogError, match=rf"row 1 .* code {code} at level 2; .* 0 to 3"):
        from_codes([[0, 1], [0, code]], level_size=(4, 4))


def test_an_unknown_item_is_named() -> None:
    with pytest.raises(DataError, match="item 5 is not in the catalog of 2 items"):
        from_codes([[0], [1]]).rows(np.array([1, 5]))


@pytest.mark.parametrize("varying_depth", [False, True])
def test_a_saved_catalog_comes_back_whole(tmp_path: Path, varying_depth: bool) -> None:
    saved = tiny_catalog(varying_depth=varying_depth)
    write(saved, tmp_path)
    found = load(tmp_path)
    assert found.digest == saved.digest
    assert found.level_size == saved.level_size
    assert found.end_code == saved.end_code
    assert np.array_equal(found.codes, saved.codes)


def test_a_saved_catalog_that_was_changed_is_refused(tmp_path: Path) -> None:
    saved = from_codes([[0, 1], [1, 0]])
    write(saved, tmp_path)
    path = tmp_path / "items.parquet"
    facts = pq.read_schema(path).metadata
    table = pq.read_table(path)
    swapped = table.set_column(0, "item_id", pa.array([1, 0]))
    pq.write_table(swapped.replace_schema_metadata(facts), path)
    with pytest.raises(DataError, match="was changed after it was sealed"):
        load(tmp_path)


def test_a_folder_without_a_catalog_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no items\.parquet"):
        load(tmp_path)


def test_a_digest_names_items_codes_and_sizes() -> None:
    same = [from_codes([[0, 1], [1, 0]]) for _ in range(2)]
    others = [
        from_codes([[0, 1], [1, 1]]),
        from_codes([[0, 1], [1, 0]], item_id=np.array([1, 0])),
        from_codes([[0, 1], [1, 0]], level_size=(3, 2)),
    ]
    assert same[0].digest == same[1].digest
    assert len({c.digest for c in (same[0], *others)}) == 4
    assert catalogs.from_codes([[0, 1], [1, 0]], title=["x", "y"]).digest == same[0].digest


@pytest.mark.slow
@examples
@given(
    st.lists(st.lists(st.integers(0, 40_000), min_size=1, max_size=5), min_size=1, max_size=20),
    st.sampled_from([pa.list_(pa.int16()), pa.list_(pa.int64()), pa.large_list(pa.int32())]),
)
def test_lists_an_array_and_a_parquet_column_make_the_same_catalog(
    tmp_path_factory: pytest.TempPathFactory, sids: list[list[int]], kind: pa.DataType
) -> None:
    sids = [[code % 30_000 for code in sid] for sid in sids] if "16" in str(kind) else sids
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    columns = {"item_id": np.arange(len(sids)), "sid": pa.array(sids, kind)}
    pq.write_table(pa.table(columns), path, row_group_size=7)
    table = np.full((len(sids), 6), -1)
    for row, sid in enumerate(sids):
        table[row, : len(sid)] = sid
    listed = from_codes(sids, varying_depth=True)
    for other in (read(path, varying_depth=True), from_codes(table, varying_depth=True)):
        assert other.digest == listed.digest
        assert np.array_equal(other.codes, listed.codes)
        assert np.array_equal(other.leaf_of_item, listed.leaf_of_item)
        assert torch.equal(other.trie.child_start, listed.trie.child_start)
    wide = max(map(max, sids)) + 1 >= 1 << 15
    assert listed.codes.dtype == (np.int32 if wide else np.int16)


@pytest.mark.parametrize(
    ("sid", "complaint"),
    [
        ([[0, 1], [2, -5], [0, 1]], "item 3 has code -5"),
        ([[0, 1], [2, None], [0, 1]], r"item 3 has code nan in its semantic ID \(1 such"),
        ([[0, 1], [2], [0, 1]], r"row 1 .* depth 1 where 2 was expected"),
        (["0-1", "2-0", "0-1"], "`sid` holds string"),
    ],
)
def test_semantic_ids_of_a_file_are_lists_of_codes(
    items: Path, sid: list[object], complaint: str
) -> None:
    rewrite(items, sid=sid)
    with pytest.raises(CatalogError, match=complaint):
        read(items)


def test_a_file_without_items_is_no_catalog(items: Path) -> None:
    pq.write_table(pq.read_table(items).slice(0, 0), items)
    with pytest.raises(CatalogError, match="no items"):
        read(items)


def test_embeddings_are_found_by_item_and_must_be_complete(tmp_path: Path) -> None:
    catalog = from_codes([[0, 0], [1, 0], [1, 1]], item_id=np.array([7, 3, 5]), level_size=(2, 2))
    path = tmp_path / "embeddings.parquet"

    def write(ids: list[int], rows: list[list[float]]) -> None:
        pq.write_table(pa.table({"item_id": ids, "embedding": rows}), path)

    write([3, 9, 5, 7], [[3.0, 1], [9, 1], [5, 1], [7, 1]])
    assert read_embeddings(path, catalog).tolist() == [[7, 1], [3, 1], [5, 1]]
    write([3, 7], [[3.0, 1], [7, 1]])
    with pytest.raises(DataError, match="item 5 has no embedding"):
        read_embeddings(path, catalog)
    write([3, 5, 7], [[3.0, 1], [5], [7, 1]])
    with pytest.raises(DataError, match="lengths from 1 to 2"):
        read_embeddings(path, catalog)
