"""The counted reward, against a definition in plain Python over the training rows."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.errors import ConfigError
from orchard.settings import RewardsConfig, TransitionConfig
from orchard.types import SearchTrees
from rewards.registry import RewardContext
from rewards.transition import transition
from rewards.transition_counts import count_transitions

Grow = Callable[..., SearchTrees]
Rows = list[tuple[list[int], int]]
ITEMS = catalogs.from_codes([[0, 1], [0, 2], [1, 0], [0, 1], [1, 1]])  # 0 and 3 share a leaf
LEAF = ITEMS.leaf_of_item
DECAY, FLOOR = 0.5, 0.01


def knowing(rows: Rows) -> RewardContext:
    history = LEAF[[item for before, _ in rows for item in before]]
    transitions = count_transitions(
        history.astype(np.int64),
        ragged.starts(np.array([len(before) for before, _ in rows])),
        LEAF[[target for _, target in rows]],
        num_leaves=ITEMS.trie.num_leaves,
        decay=DECAY,
    )
    settings = RewardsConfig(transition=TransitionConfig(decay=DECAY, floor=FLOOR))
    return RewardContext(catalog=ITEMS, settings=settings, transitions=transitions)


def expected(rows: Rows, judged: int, leaf: int) -> float:
    """The sum of the docstring over all rows but the one that is judged."""
    others = [row for index, row in enumerate(rows) if index != judged]
    strength = 0.0
    for age, item in enumerate(reversed(rows[judged][0])):
        met = total = 0.0
        for before, target in others:
            weight = sum(
                DECAY**j for j, other in enumerate(reversed(before)) if LEAF[other] == LEAF[item]
            )
            total += weight
            met += weight if LEAF[target] == leaf else 0
        strength += DECAY**age * met / (1 + total)
    return math.log(FLOOR + strength)


item = st.integers(0, len(ITEMS) - 1)
row = st.tuples(st.lists(item, min_size=1, max_size=4), item)


@pytest.mark.slow
@given(rows=st.lists(row, min_size=1, max_size=6))
def test_a_row_is_judged_by_what_the_other_rows_counted(trees_with: Grow, rows: Rows) -> None:
    leaves = np.arange(ITEMS.trie.num_leaves)
    trees = trees_with(ITEMS, [leaves] * len(rows), targets=[target for _, target in rows])
    history = np.array([item for before, _ in rows for item in before], np.int64)
    start = ragged.starts(np.array([len(before) for before, _ in rows]))
    trees = replace(trees, prompts=replace(trees.prompts, history=history, history_start=start))
    found = transition(trees, knowing(rows))
    wanted = [expected(rows, judged, int(leaf)) for judged in range(len(rows)) for leaf in leaves]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_without_counts_it_is_refused(trees_with: Grow) -> None:
    trees = trees_with(ITEMS, [[0]], targets=[0])
    with pytest.raises(ConfigError, match="transition needs the transition counts"):
        transition(trees, RewardContext(catalog=ITEMS))
