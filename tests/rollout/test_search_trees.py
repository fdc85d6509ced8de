"""Trees grown from candidates: shape, numbers, and what cutting and joining leaves of them."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from orchard.testing import TinySetup
from orchard.types import Prompts, SearchTrees
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search_trees import build_search_trees


@pytest.fixture(scope="session", params=["beam", "sample"])
def candidates(request: pytest.FixtureRequest, world: TinySetup, engine: TorchEngine) -> Candidates:
    if request.param == "beam":
        return beam(engine, world.prompts, width=9)
    return sample(engine, world.prompts, count=20, temperature=1.0, seed=0)


@pytest.fixture(scope="session")
def trees(world: TinySetup, candidates: Candidates) -> SearchTrees:
    return build_search_trees(world.prompts, candidates, world.tokenizer, world.version)


def same(a: object, b: object) -> bool:
    if isinstance(a, SearchTrees | Prompts):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_nodes_are_in_preorder(trees: SearchTrees) -> None:
    roots = trees.parent == SearchTrees.NO_PARENT
    assert np.flatnonzero(roots).tolist() == trees.node_start[:-1].tolist()
    assert np.array_equal(trees.step == 0, roots)
    for node in np.flatnonzero(~roots):
        # The node before is its parent, or the end of an elder sibling's subtree.
        above = node - 1
        while above != trees.parent[node]:
            assert trees.step[above] >= trees.step[node]
            above = trees.parent[above]
        assert trees.step[node] == trees.step[above] + 1


def test_a_node_is_a_distinct_trie_node_below_its_parents(
    world: TinySetup, trees: SearchTrees
) -> None:
    inner, state = trees.step > 0, torch.from_numpy(trees.state)
    parents = world.catalog.trie.parent(state).numpy()
    assert np.array_equal(parents[inner], trees.state[trees.parent[inner]])
    assert len({*zip(trees.prompt_of_node, trees.state, strict=True)}) == len(trees.state)


def test_every_leaf_is_a_catalog_item(world: TinySetup, trees: SearchTrees) -> None:
    catalog = world.catalog
    paths = trees.paths()
    for row, (leaf, path) in enumerate(zip(trees.leaf, paths, strict=True)):
        nodes = path[path >= 0]
        assert tuple(trees.state[nodes]) == world.leaf_path[leaf]
        assert (trees.prompt_of_node[nodes] == trees.prompt_of_candidate[row]).all()
        items = catalog.item_of_leaf[catalog.leaf_start[leaf] : catalog.leaf_start[leaf + 1]]
        codes = catalog.codes[items[0]]
        tokens = [int(world.tokenizer.tokens_at(d)[c]) for d, c in enumerate(codes) if c >= 0]
        assert trees.token[trees.token_start[nodes]].tolist() == tokens


def test_every_tree_node_is_on_some_candidates_path(trees: SearchTrees) -> None:
    paths = trees.paths()
    assert sorted({*paths[paths >= 0].tolist()}) == np.flatnonzero(trees.step > 0).tolist()


def test_log_probabilities_along_a_path_sum_to_the_score(trees: SearchTrees) -> None:
    assert np.diff(trees.token_start).tolist() == (trees.step > 0).astype(int).tolist()
    of_node = np.zeros(len(trees.step))
    of_node[trees.step > 0] = trees.logprob
    paths = trees.paths()
    total = np.where(paths >= 0, of_node[paths], 0.0).sum(1)
    assert np.allclose(total, trees.score, atol=1e-6)


def test_forced_nodes_are_only_children_in_the_trie(world: TinySetup, trees: SearchTrees) -> None:
    inner = trees.step > 0
    above = torch.from_numpy(trees.state[trees.parent[inner]])
    lone = (world.catalog.trie.num_children(above) == 1).numpy()
    assert np.array_equal(trees.forced, lone)
    assert (trees.logprob[lone] == 0).all()
    assert (trees.logprob[~lone] < 0).all()


def test_candidates_keep_their_order(trees: SearchTrees, candidates: Candidates) -> None:
    assert trees.leaf.tolist() == candidates.leaf.tolist()
    assert trees.score.tolist() == candidates.score.tolist()
    ends = trees.state[trees.candidate]
    last = (candidates.node >= 0).sum(1) - 1
    assert ends.tolist() == candidates.node[np.arange(len(last)), last].tolist()
    assert len({*trees.candidate.tolist()}) == len(
        {*zip(trees.prompt_of_candidate, trees.leaf, strict=True)}
    )


def test_cutting_and_joining_gives_the_trees_back(trees: SearchTrees) -> None:
    assert same(trees.select(np.arange(4)), trees)
    order, back = np.array([2, 0, 3, 1]), np.array([1, 3, 0, 2])
    assert same(trees.select(order).select(back), trees)
    parts = [trees.select(np.arange(0, 1)), trees.select(np.arange(1, 4))]
    joined = SearchTrees.concatenate(parts)
    assert joined.cost == trees.cost + trees.cost  # each part carries the cost of the whole
    assert all(
        same(getattr(joined, f.name), getattr(trees, f.name))
        for f in fields(trees)
        if f.name != "cost"
    )
