"""The trie against a dictionary of sets, on random catalogs."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog.catalog import Catalog, from_codes
from orchard.catalog.trie import Trie, offset_type, sort_rows
from orchard.testing import tiny_catalog

Path = tuple[int, ...]


@dataclass(frozen=True)
class Oracle:
    """Plain trie: a set of paths, and after each path a set of codes."""

    node: dict[Path, int]
    after: dict[Path, set[int]]

    @property
    def paths(self) -> list[Path]:
        return list(self.node)


def oracle_of(catalog: Catalog) -> Oracle:
    sequences = {tuple(int(c) for c in row if c >= 0) for row in catalog.codes}
    prefixes = {s[:n] for s in sequences for n in range(len(s) + 1)}
    ordered = sorted(prefixes, key=lambda p: (len(p), p))
    after: dict[Path, set[int]] = {p: set() for p in ordered}
    for prefix in ordered[1:]:
        after[prefix[:-1]].add(prefix[-1])
    return Oracle({p: i for i, p in enumerate(ordered)}, after)


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12)
# A busy machine is no counterexample.
examples = settings(max_examples=60)


def world(codes: list[list[int]]) -> tuple[Catalog, Trie, Oracle]:
    catalog = from_codes(codes, varying_depth=True)
    return catalog, catalog.trie, oracle_of(catalog)


def every(oracle: Oracle) -> torch.Tensor:
    return torch.arange(len(oracle.node))


@examples
@given(sequences)
def test_nodes_are_numbered_by_depth_and_then_by_path(codes: list[list[int]]) -> None:
    _, trie, oracle = world(codes)
    assert trie.num_nodes == len(oracle.node)
    for path, nodes in zip(oracle.paths, trie.path(every(oracle)).tolist(), strict=True):
        inside = [n for n in nodes if n >= 0]
        assert tuple(trie.code[inside].tolist()) == path
    assert trie.depth_of(every(oracle)).tolist() == [len(p) for p in oracle.paths]


@pytest.mark.slow
@examples
@given(sequences)
def test_children_are_the_codes_that_may_follow_in_order(codes: list[list[int]]) -> None:
    _, trie, oracle = world(codes)
    order = torch.randperm(trie.num_nodes, generator=torch.Generator().manual_seed(0))
    children = trie.children(order)
    for f, node in enumerate(order.tolist()):
        path, mine = oracle.paths[node], children.node[children.start[f] : children.start[f + 1]]
        assert mine.tolist() == [oracle.node[(*path, c)] for c in sorted(oracle.after[path])]
        assert (children.owner[children.start[f] : children.start[f + 1]] == f).all()
    assert torch.equal(trie.num_children(order), children.start.diff())


@pytest.mark.slow
@examples
@given(sequences)
def test_a_parent_is_its_childs_path_but_for_the_last_code(codes: list[list[int]]) -> None:
    _, trie, oracle = world(codes)
    expected = [oracle.node[p[:-1]] for p in oracle.paths]  # the root is its own parent
    assert trie.parent(every(oracle)).tolist() == expected


@pytest.mark.slow
@examples
@given(sequences)
def test_descending_follows_codes_without_an_alternative(codes: list[list[int]]) -> None:
    _, trie, oracle = world(codes)
    for path, reached in zip(oracle.paths, trie.descend(every(oracle)).tolist(), strict=True):
        while len(oracle.after[path]) == 1:
            path = (*path, *oracle.after[path])
        assert reached == oracle.node[path]


@pytest.mark.slow
@examples
@given(sequences)
def test_leaves_are_the_sequences_and_hold_their_items(codes: list[list[int]]) -> None:
    catalog, trie, oracle = world(codes)
    leaves = [oracle.node[p] for p in oracle.paths if not oracle.after[p]]
    assert trie.code[0] == -1
    assert trie.leaf_node.tolist() == leaves
    assert trie.leaf(trie.leaf_node).tolist() == list(range(trie.num_leaves))
    node = [oracle.node[tuple(c for c in row if c >= 0)] for row in catalog.codes.tolist()]
    assert np.array_equal(trie.leaf(torch.tensor(node)).numpy(), catalog.leaf_of_item)
    for leaf in range(trie.num_leaves):
        items = catalog.item_of_leaf[catalog.leaf_start[leaf] : catalog.leaf_start[leaf + 1]]
        assert items.tolist() == np.flatnonzero(catalog.leaf_of_item == leaf).tolist()
        assert catalog.place_in_leaf[items].tolist() == list(range(len(items)))


@pytest.mark.slow
@examples
@given(sequences)
def test_end_markers_are_added_to_prefixes_and_to_nothing_else(codes: list[list[int]]) -> None:
    catalog = from_codes(codes, varying_depth=True)
    for sequence, row in zip(codes, catalog.codes.tolist(), strict=True):
        inside = [c for c in row if c >= 0]
        prefix = any(o[: len(sequence)] == sequence and o != sequence for o in codes)
        ends = [catalog.end_code[len(sequence)]] if prefix else []
        assert inside == [*sequence, *ends]
    same = {tuple(a): leaf for a, leaf in zip(codes, catalog.leaf_of_item, strict=True)}
    assert len(set(same.values())) == len(same) == catalog.trie.num_leaves


def test_a_trie_keeps_its_content_on_another_device() -> None:
    trie = from_codes([[0, 1], [2, 1]]).trie
    moved = trie.to("meta")
    assert moved.code.device.type == "meta"
    assert moved.level_start.shape == trie.level_start.shape


@pytest.mark.parametrize("depth", [1, 5])
def test_a_lone_item_is_one_chain(depth: int) -> None:
    trie = from_codes([[0] * depth]).trie
    assert trie.descend(torch.tensor([0])).tolist() == [depth]
    assert trie.num_leaves == 1


@examples
@given(st.integers(0, 2**16), st.integers(1, 3), st.sampled_from([3, 70_000, 2**31 - 2]))
def test_rows_too_wide_for_one_number_sort_as_narrow_ones_do(
    seed: int, depth: int, top: int
) -> None:
    table = np.random.default_rng(seed).integers(-1, 3, (20, depth)).astype(np.int32)
    table[table == 2] = top
    order, column = sort_rows(table)
    expected = sorted(range(20), key=lambda row: (table[row].tolist(), row))
    assert order.tolist() == expected
    assert np.array_equal(column.T, table[expected])


def test_codes_and_offsets_are_as_wide_as_they_need_to_be() -> None:
    assert from_codes([[0], [32_768]]).trie.code.dtype == torch.int32
    assert from_codes([[0], [32_767]]).trie.code.dtype == torch.int16
    assert from_codes([[0], [1]]).trie.child_start.dtype == torch.int32
    assert offset_type(2**31 - 1) is np.int32
    assert offset_type(2**31) is np.int64


def test_a_trie_is_rebuilt_around_the_buffers_of_its_pickle() -> None:
    trie = tiny_catalog(varying_depth=True).trie
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(trie, protocol=5, buffer_callback=buffers.append)
    read_only = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    again: Trie = pickle.loads(data, buffers=read_only)
    for name in ("code", "child_start", "level_start", "early_leaf"):
        assert torch.equal(getattr(again, name), getattr(trie, name))
    mapped = [np.frombuffer(view, np.uint8) for view in read_only if len(view)]
    assert any(np.shares_memory(again.code.numpy().view(np.uint8), part) for part in mapped)
    assert again.catalog == trie.catalog
    assert torch.equal(
        again.children(torch.tensor([0])).node, trie.children(torch.tensor([0])).node
    )


@examples
@given(sequences)
def test_leaves_are_counted_at_or_below_every_node(codes: list[list[int]]) -> None:
    _, trie, oracle = world(codes)
    leaves = [path for path in oracle.paths if not oracle.after[path]]
    expected = [sum(leaf[: len(path)] == path for leaf in leaves) for path in oracle.paths]
    assert trie.leaves_below(every(oracle)).tolist() == expected
