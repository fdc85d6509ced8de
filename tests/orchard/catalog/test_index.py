"""What the trie file gives back, and what it refuses."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog import index
from orchard.catalog.catalog import Catalog, from_codes
from orchard.errors import DataError
from orchard.testing import tiny_catalog

CATALOGUE = tiny_catalog(varying_depth=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    index.save(index.from_catalog(CATALOGUE), tmp_path / "items.trie")
    return tmp_path / "items.trie"


def same(found: index.TrieIndex, catalog: Catalog) -> bool:
    names = ("code", "child_start", "level_start", "early_leaf")
    pairs = [(getattr(found.trie, name), getattr(catalog.trie, name)) for name in names]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@settings(max_examples=30)
@given(sids=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=12))
def test_a_file_gives_back_the_trie_and_the_items_of_every_leaf(
    tmp_path_factory: pytest.TempPathFactory, sids: list[list[int]]
) -> None:
    catalog = from_codes(sids, varying_depth=True)
    path = tmp_path_factory.mktemp("trie") / "items.trie"
    index.save(index.from_catalog(catalog), path)
    found = index.load(path)
    assert same(found, catalog)
    assert found.trie.catalog == catalog.digest
    leaf = np.random.default_rng(0).integers(catalog.trie.num_leaves, size=7)
    item, start = found.items(leaf)
    for place, one in enumerate(leaf):
        low, high = catalog.leaf_start[one], catalog.leaf_start[one + 1]
        assert item[start[place] : start[place + 1]].tolist() == (
            catalog.item_of_leaf[low:high].tolist()
        )


def test_tensors_and_arrays_are_views_of_one_mapping(path: Path) -> None:
    found, content = index.load(path), path.read_bytes()
    trie = found.trie
    parts = [trie.code, trie.child_start, trie.level_start, torch.from_numpy(found.item_of_leaf)]
    place = [content.index(part.numpy().tobytes()) for part in parts]
    assert all(offset % 64 == 0 for offset in place)
    assert {part.data_ptr() - offset for part, offset in zip(parts, place, strict=True)} == {
        parts[0].data_ptr() - place[0]
    }


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="is no trie file|bytes of .*copy it again"):
        index.load(path)


def test_a_corrupted_file_is_refused_wherever_it_was_hit(path: Path) -> None:
    content = path.read_bytes()
    for at in range(8, len(content), 5):
        hit = bytearray(content)
        hit[at] ^= 4
        path.write_bytes(hit)
        with pytest.raises(DataError, match="is corrupted|has format|bytes of"):
            index.load(path)


def test_a_file_of_another_format_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:8] + struct.pack("<I", 7) + content[12:])
    with pytest.raises(DataError, match="has format 7, this release reads 1; build it again"):
        index.load(path)


def test_other_files_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        index.load(tmp_path / "items.trie")
    (tmp_path / "items.trie").write_bytes(b"item_id,sid\n" * 10)
    with pytest.raises(DataError, match="is no trie file"):
        index.load(tmp_path / "items.trie")


def test_a_new_file_takes_the_place_of_the_old_one_while_that_is_mapped(path: Path) -> None:
    old = index.load(path)
    other = from_codes([[0, 1], [1, 1], [0, 1]])
    index.save(index.from_catalog(other), path)
    assert same(old, CATALOGUE)
    assert same(index.load(path), other)
    assert [p.name for p in path.parent.iterdir()] == ["items.trie"]
