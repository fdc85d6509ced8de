"""Rewards against worked examples and plain-Python references."""

from dataclasses import replace
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard.catalog import catalog as catalogs
from orchard.settings import RewardsConfig
from orchard.testing import tiny_catalog
from rewards.registry import RewardContext
from rewards.rule import prefix, ranking, rule
from tests.fixtures.trees import trees_of

WIDE = catalogs.from_codes([[code] for code in range(17)])
KNOWN = RewardContext(catalog=WIDE)
PUBLISHED = RewardContext(catalog=WIDE, settings=RewardsConfig(ranking_variant="paper"))


@pytest.mark.parametrize(
    ("hit", "expected"),
    [
        (4, "-.1638 -.1033 -.0819 0 -.0634 -.0583 -.0546 -.0517 -.0493 -.0473 -.0457 -.0443 -.0430"
            " -.0419 -.0409 -.0401"),
        (1, "0 -.1033 -.0819 -.0705 -.0634 -.0583 -.0546 -.0517 -.0493 -.0473 -.0457 -.0443 -.0430"
            " -.0419 -.0409 -.0401"),
        (17, " ".join(["0"] * 16)),
    ],
)  # fmt: skip
def test_ranking_equals_the_worked_example_of_sixteen_candidates(hit: int, expected: str) -> None:
    trees = trees_of(WIDE, [range(16)], targets=[hit - 1])
    np.testing.assert_allclose(
        ranking(trees, KNOWN), [float(number) for number in expected.split()], atol=5e-5
    )


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=6), min_size=1, max_size=4))
def test_ranking_equals_its_definition_for_groups_of_any_size_and_repeats(
    groups: list[list[int]],
) -> None:
    trees = trees_of(WIDE, groups, targets=[3] * len(groups))
    expected = [
        0.0 if leaf == 3 or 3 not in group
        else -(1 / log2(rank + 1)) / sum(1 / log2(j + 1) for j in range(1, len(group) + 1))
        for group in groups
        for rank, leaf in enumerate(group, start=1)
    ]  # fmt: skip
    np.testing.assert_allclose(ranking(trees, KNOWN), expected, rtol=1e-6)


def test_the_published_form_equals_the_worked_example() -> None:
    trees = trees_of(WIDE, [range(16)], targets=[3])
    expected = (
        "-.1762 -.1112 -.0881 0 -.0682 -.0628 -.0587 -.0556 -.0530 -.0509 -.0492 -.0476 -.0463 "
        "-.0451 -.0441 -.0431"
    )
    found = ranking(trees, PUBLISHED)
    np.testing.assert_allclose(found, [float(n) for n in expected.split()], atol=5e-5)
    # With the rule the group's mean is 0: one, less one shared by the misses.
    assert (found + rule(trees, PUBLISHED)).sum() == pytest.approx(0, abs=1e-6)


def test_the_published_form_shares_out_one_even_without_a_hit_and_the_coded_form_does_not() -> None:
    trees = trees_of(WIDE, [[5, 4], [3, 3], [3, 9, 3]], targets=[3, 3, 3])
    found = ranking(trees, PUBLISHED)
    assert np.add.reduceat(found, [0, 2, 4]).tolist() == pytest.approx([-1, 0, -1])
    assert found[0] < found[1] < 0
    assert found[[2, 3, 4, 6]].tolist() == [0, 0, 0, 0]
    assert ranking(trees, KNOWN)[:4].tolist() == [0, 0, 0, 0]


def test_rule_is_one_for_the_target_and_for_every_copy_of_it() -> None:
    trees = trees_of(WIDE, [[5, 3, 3], [4]], targets=[3, 3])
    assert rule(trees, KNOWN).tolist() == [0, 1, 1, 0]


def test_equal_histories_are_judged_by_their_own_targets() -> None:
    trees = trees_of(WIDE, [[5, 3], [5, 3]], targets=[3, 5])
    same = trees.prompts.select(np.array([0, 0]))
    trees = replace(trees, prompts=replace(same, target=trees.prompts.target))
    assert rule(trees, KNOWN).tolist() == [0, 1, 1, 0]
    assert (ranking(trees, KNOWN) < 0).tolist() == [True, False, False, True]


def test_items_of_one_semantic_id_are_one_target() -> None:
    catalog = catalogs.from_codes([[0, 1], [0, 2], [0, 1]])
    leaf = int(catalog.leaf_of_item[0])
    trees, known = trees_of(catalog, [[leaf]], targets=[2]), RewardContext(catalog=catalog)
    assert rule(trees, known).tolist() == [1]


@pytest.mark.parametrize("varying_depth", [False, True])
def test_prefix_is_the_share_of_leading_codes_in_common(varying_depth: bool) -> None:
    catalog = tiny_catalog(varying_depth=varying_depth)
    leaves = range(catalog.trie.num_leaves)
    trees = trees_of(catalog, [leaves] * len(catalog), targets=range(len(catalog)))
    codes = [[int(code) for code in row if code >= 0] for row in catalog.codes]
    of_leaf = {int(leaf): row for leaf, row in zip(catalog.leaf_of_item, codes, strict=True)}
    expected = [
        next((i for i, (a, b) in enumerate(zip(of_leaf[leaf], target, strict=False)) if a != b),
             min(len(of_leaf[leaf]), len(target))) / len(target)
        for target in codes
        for leaf in leaves
    ]  # fmt: skip
    known = RewardContext(catalog=catalog)
    np.testing.assert_allclose(prefix(trees, known), expected, rtol=1e-6)
    assert ((prefix(trees, known) == 1) == (rule(trees, known) == 1)).all()
