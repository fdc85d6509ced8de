"""The weights of candidates where forced codes do not count."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from learner.advantage.estimators import ESTIMATORS, group
from orchard.testing import tiny_catalog
from orchard.types import ScoredTrees, SearchTrees
from tests.fixtures.registries import Borrow


def test_a_candidate_weighs_by_the_number_of_its_free_codes(
    trees_with: Callable[..., SearchTrees], borrow: Borrow
) -> None:
    borrow(ESTIMATORS)
    from benchmarks.quality.free_codes import group_free

    trees = trees_with(tiny_catalog(), [range(4), range(3)], targets=[0, 0])
    forced = np.zeros_like(trees.forced)
    forced[::2] = True  # of the tokens of all nodes
    forced[trees.token_start[trees.paths()[0]]] = True  # and all of the first candidate
    trees = replace(trees, forced=forced)
    scored = ScoredTrees(trees=trees, reward=np.array([1, 0, 0, 0, 0, 1, 0], np.float32), parts={})
    plain, free = group(scored, 1e-4), group_free(scored, 1e-4)
    assert np.array_equal(plain.advantage, free.advantage)
    assert not free.weight[0].any()
    for candidate, path in enumerate(trees.paths()):
        spans = [(trees.token_start[node], trees.token_start[node + 1]) for node in path]
        count = sum(not forced[token] for span in spans for token in range(*span))
        expected = 1 / (7 * count) if count else 0.0
        np.testing.assert_allclose(free.weight[candidate], expected, rtol=1e-6)
