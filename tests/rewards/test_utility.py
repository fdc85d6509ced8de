"""The reward from utilities: what it adds up to, and that a prompt does not judge itself."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from orchard.data.prompts import Split
from orchard.errors import ConfigError, DataError
from orchard.feedback.fit import next_items, utilities_of
from orchard.settings import RewardsConfig
from orchard.settings.rewards import UtilityConfig
from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.context import RewardContext
from rewards.rule import ranking, rule
from rewards.score import preload, score_all
from rewards.steps import step_statistics
from rewards.utility import step_utilities, utility

Grow = Callable[..., SearchTrees]
CATALOG = tiny_catalog(seed=3, num_items=40)
LEAVES = np.arange(CATALOG.trie.num_leaves)
TARGETS = [3, 3, 8, 12]


@pytest.fixture
def trees(trees_with: Grow) -> SearchTrees:
    """Every leaf as a candidate of four prompts, the first three of which have one history."""
    grown = trees_with(CATALOG, [LEAVES.tolist()] * 4, targets=TARGETS)
    history = np.array([1, 2, 1, 2, 1, 2, 5, 6])
    return replace(grown, prompts=replace(grown.prompts, history=history))


def rows_of(trees: SearchTrees, kept: list[int]) -> Split:
    """Return the rows that some of the prompts were made from."""
    prompts = trees.prompts.select(np.array(kept))
    return Split(
        user=np.array(kept), history=prompts.history,
        history_start=prompts.history_start, target=prompts.target,
    )  # fmt: skip


def knowing(rows: Split, *, first: int | None = 0, **settings: object) -> RewardContext:
    config = UtilityConfig.model_validate(settings)
    fitted, of_feedback = utilities_of(config, CATALOG, rows, None)
    assert not of_feedback
    return RewardContext(
        catalog=CATALOG, settings=RewardsConfig(utility=config, steps="utility"),
        utilities=fitted, first_request=first,
    )  # fmt: skip


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_what_codes_add_makes_the_utility_of_the_item(trees: SearchTrees, floor: float) -> None:
    ctx = knowing(rows_of(trees, [0, 1, 2, 3]), floor=floor)
    steps, whole = step_utilities(trees, ctx), utility(trees, ctx)
    np.testing.assert_allclose(steps.sum(1), whole, atol=1e-6)
    value = ctx.prefix_utilities.of(trees)
    gain = np.log(floor + value) if floor else value
    np.testing.assert_allclose(whole, gain[:, -1] - gain[:, 0], atol=1e-6)
    assert np.unique(whole).size > 4


def test_a_prompt_is_judged_by_the_other_rows(trees: SearchTrees) -> None:
    found = utility(trees, knowing(rows_of(trees, [0, 1, 2, 3]))).reshape(4, -1)
    for own in range(4):
        others = [row for row in range(4) if row != own]
        anew = utility(trees, knowing(rows_of(trees, others), first=None)).reshape(4, -1)
        np.testing.assert_allclose(found[own], anew[own], atol=1e-6)
    # The first two rows are alike, so that each learns of its target from the other alone.
    target = int(CATALOG.leaf_of_item[3])
    assert found[0].argmax() == target
    assert found[3].argmax() != CATALOG.leaf_of_item[12]


def test_a_prompt_of_another_split_is_not_left_out(trees: SearchTrees) -> None:
    ctx = knowing(rows_of(trees, [0, 1, 2, 3]))
    asked = replace(trees, prompts=replace(trees.prompts, target=np.array([9, 9, 9, 9])))
    without = replace(ctx, first_request=None)
    np.testing.assert_array_equal(utility(asked, ctx), utility(asked, without))
    assert (utility(trees, ctx) != utility(trees, without)).any()


def test_steps_carry_utilities_and_their_name(trees: SearchTrees) -> None:
    ctx = knowing(rows_of(trees, [0, 1, 2, 3]))
    scored = score_all(trees, ctx, {"utility": 1.0})
    assert scored.step_reward is not None
    np.testing.assert_array_equal(scored.step_reward, step_utilities(trees, ctx))
    assert {"utility_1", "step_signal_share"} <= step_statistics(scored, "utility").keys()


def test_rows_may_say_their_rewards_and_weights(trees: SearchTrees) -> None:
    rows = replace(rows_of(trees, [0, 2]), reward=np.array([2.0, 0.5]), weight=np.array([1.0, 3.0]))
    examples = next_items(rows, CATALOG)
    assert examples.reward.tolist() == [2.0, 0.5]
    assert examples.weight.tolist() == [1.0, 3.0]


def test_what_is_missing_or_undefined_is_named(trees: SearchTrees) -> None:
    with pytest.raises(ConfigError, match="the reward utility needs utilities of prefixes"):
        utility(trees, RewardContext(catalog=CATALOG))
    with pytest.raises(ConfigError, match="the reward utility needs utilities of prefixes"):
        preload(
            {"rule": 1.0}, RewardContext(catalog=CATALOG, settings=RewardsConfig(steps="utility"))
        )
    with pytest.raises(ConfigError, match="needs feedback; set data.feedback"):
        knowing(rows_of(trees, [0]), source="feedback")
    rows = replace(rows_of(trees, [0, 1, 2, 3]), reward=np.full(4, -50.0))
    with pytest.raises(DataError, match="set rewards.utility.floor = 0"):
        utility(trees, knowing(rows, floor=1e-3))


def test_rewards_of_targets_are_those_of_the_feedback(trees: SearchTrees) -> None:
    told = replace(trees, prompts=replace(trees.prompts, reward=np.float32([0.5, 0, -1, 2])))
    ctx = RewardContext(catalog=CATALOG)
    best = rule(told, ctx).reshape(4, -1)
    assert best.max(1).tolist() == [0.5, 0.0, 0.0, 2.0]
    assert best.min(1).tolist() == [0.0, 0.0, -1.0, 0.0]
    assert (ranking(told, ctx).reshape(4, -1) != 0).any(1).tolist() == [True, False, False, True]
    scored = score_all(told, ctx, {"rule": 1.0})
    assert scored.step_reward is not None
    assert scored.step_reward.reshape(4, len(LEAVES), -1).any((1, 2)).tolist() == [
        True, False, False, True,
    ]  # fmt: skip
