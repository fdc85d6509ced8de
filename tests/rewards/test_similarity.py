"""Rewards that compare items, against plain-Python definitions."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.catalog import catalog as catalogs
from orchard.evaluation.ranking import diversity as list_diversity
from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.registry import RewardContext
from rewards.similarity import diversity, popularity_debias, semantic

Grow = Callable[..., SearchTrees]
PAIRS = catalogs.from_codes([[0, 1], [0, 2], [1, 0], [0, 1]])  # items 0 and 3 share a leaf


def test_semantic_is_the_cosine_with_the_target_and_one_for_its_own_leaf(trees_with: Grow) -> None:
    vectors = np.array([[2, 0], [0, 3], [-1, 0], [1, 0]], np.float32)
    known = RewardContext(catalog=PAIRS, embedding=vectors)
    leaf = PAIRS.leaf_of_item
    trees = trees_with(PAIRS, [leaf[:3], leaf[:3]], targets=[0, 1])
    np.testing.assert_allclose(semantic(trees, known), [1, 0, -1, 0, 1, 0], atol=1e-6)


def test_items_of_one_leaf_are_compared_by_their_mean_direction(trees_with: Grow) -> None:
    vectors = np.array([[5, 0], [0, 3], [-1, 0], [0, 1]], np.float32)
    known = RewardContext(catalog=PAIRS, embedding=vectors)
    trees = trees_with(PAIRS, [[PAIRS.leaf_of_item[0]]] * 2, targets=[1, 3])
    np.testing.assert_allclose(semantic(trees, known), [np.sqrt(0.5), 1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("varying_depth", [False, True])
@settings(max_examples=50)
@given(data=st.data())
def test_diversity_is_the_mean_share_of_codes_that_others_do_not_share(
    trees_with: Grow, varying_depth: bool, data: st.DataObject
) -> None:
    catalog = tiny_catalog(varying_depth=varying_depth)
    leaves = st.integers(0, catalog.trie.num_leaves - 1)
    groups = data.draw(st.lists(st.lists(leaves, min_size=1, max_size=5), min_size=1, max_size=3))
    trees = trees_with(catalog, groups, targets=[0] * len(groups))
    codes = {
        int(leaf): [int(c) for c in row if c >= 0]
        for leaf, row in zip(catalog.leaf_of_item, catalog.codes, strict=True)
    }

    def apart(a: list[int], b: list[int]) -> float:
        common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                      min(len(a), len(b)))  # fmt: skip
        return 1 - common / len(a)

    expected = [
        np.mean([apart(codes[one], codes[other]) for j, other in enumerate(group) if j != i])
        if len(group) > 1
        else 0.0
        for group in groups
        for i, one in enumerate(group)
    ]
    found = diversity(trees, RewardContext(catalog=catalog))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_mean_diversity_of_a_group_is_that_of_its_list(trees_with: Grow) -> None:
    catalog = tiny_catalog()
    trees = trees_with(catalog, [[0, 3, 4, 9, 9]], targets=[0])
    found = diversity(trees, RewardContext(catalog=catalog))
    listed = list_diversity(path=trees.paths(), start=trees.candidate_start)
    assert found.mean() == pytest.approx(listed, rel=1e-6)


def test_popularity_debias_falls_from_what_was_never_a_target_to_what_was_most_often(
    trees_with: Grow,
) -> None:
    known = RewardContext(catalog=PAIRS, popularity=np.array([3, 1, 0, 4]))
    leaf = PAIRS.leaf_of_item
    trees = trees_with(PAIRS, [leaf[:3]], targets=[0])
    expected = [0, 1 - np.log(2) / np.log(8), 1]
    np.testing.assert_allclose(popularity_debias(trees, known), expected, atol=1e-6)


def test_without_any_target_all_are_equally_rare(trees_with: Grow) -> None:
    known = RewardContext(catalog=PAIRS, popularity=np.zeros(4, np.int64))
    assert popularity_debias(trees_with(PAIRS, [[0, 1]], targets=[0]), known).tolist() == [1, 1]
