"""Views against counting leaves one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog.catalog import from_codes
from orchard.catalog.view import full_view, view_of_items, view_of_leaves
from orchard.testing import tiny_catalog

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12)


@pytest.mark.slow
@settings(max_examples=60)
@given(sequences, st.integers(0, 2**12 - 1))
def test_a_node_counts_the_live_leaves_at_and_below_it(codes: list[list[int]], bits: int) -> None:
    trie = from_codes(codes, varying_depth=True).trie
    live = torch.tensor([bool(bits >> leaf & 1) for leaf in range(trie.num_leaves)])
    view = view_of_leaves(trie, live)
    expected = torch.zeros(trie.num_nodes, dtype=torch.long)
    expected[0] = live.sum()
    for path in trie.path(trie.leaf_node[live]).tolist():
        expected[[node for node in path if node >= 0]] += 1
    assert torch.equal(view.num_live(torch.arange(trie.num_nodes)), expected)
    assert torch.equal(view.live, expected > 0)
    assert view.num_leaves == live.sum()


def test_a_leaf_is_live_if_any_of_its_items_is() -> None:
    catalog = tiny_catalog(varying_depth=True)
    live = np.random.default_rng(0).random(len(catalog)) < 0.4
    view = view_of_items(catalog, live)
    node = catalog.trie.leaf_node
    for leaf, found in enumerate(view.live[node].tolist()):
        assert found == live[catalog.leaf_of_item == leaf].any()
    assert view.catalog == catalog.digest


@pytest.mark.parametrize(("width", "kind"), [(127, torch.int8), (128, torch.int16)])
def test_counts_are_as_narrow_as_a_level_allows(width: int, kind: torch.dtype) -> None:
    codes = [[0, code] for code in range(width)] + [[1, 0]]
    view = full_view(from_codes(codes).trie)
    assert [count.dtype for count in view.count] == [torch.int16, kind]
    assert view.num_live(torch.arange(3)).tolist() == [width + 1, width, 1]
    assert view.num_bytes == len(view.live) + 2 + 2 * kind.itemsize


def test_a_view_keeps_its_content_on_another_device() -> None:
    view = full_view(tiny_catalog().trie)
    moved = view.to("meta")
    assert moved.live.device.type == moved.count[0].device.type == "meta"
    assert moved.live.shape == view.live.shape
