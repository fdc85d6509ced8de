"""Test estimators against worked examples, plain references and their identities."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.advantage.estimators import ESTIMATORS, candidate_lengths, group_statistics
from orchard import arrays
from orchard.types import ScoredTrees

Grow = Callable[..., ScoredTrees]
EPSILON = 1e-4
WHOLE = (
    "group",
    "dapo",
    "drgrpo",
    "leave_one_out",
)  # one advantage to a candidate, within its group
reward_groups = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, -0.25, 0.1]), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)
OF_SEARCHES = [name for name in ESTIMATORS if name != "snips"]
"""Estimators of candidates that a search found; `snips` takes logged draws alone."""
RANKING = "-.1638 -.1033 -.0819 1 -.0634 -.0583 -.0546 -.0517 -.0493 -.0473 -.0457 -.0443 -.0430"
RANKING_AT_4 = [float(number) for number in f"{RANKING} -.0419 -.0409 -.0401".split()]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (RANKING_AT_4, {0: -0.6287, 1: -0.4028, 2: -0.3226, 3: 3.7218, 4: -0.2533, 15: -0.1663}),
        ([1.0] + [0.0] * 15, {0: 3.7485} | {candidate: -0.2499 for candidate in range(1, 16)}),
    ],
)
def test_group_advantages_equal_the_worked_examples_of_sixteen_candidates(
    score_leaves: Grow, rewards: list[float], expected: dict[int, float]
) -> None:
    credit = ESTIMATORS["group"](score_leaves([range(16)], [rewards]), EPSILON)
    for candidate, advantage in expected.items():
        assert credit.advantage[candidate, 0] == pytest.approx(advantage, abs=3e-4)


@pytest.mark.slow
@given(rewards=reward_groups)
@pytest.mark.parametrize("name", WHOLE)
def test_advantages_sum_to_zero_within_every_group(
    score_leaves: Grow, name: str, rewards: list[list[float]]
) -> None:
    scored = score_leaves([range(len(group)) for group in rewards], rewards)
    total = np.bincount(
        scored.trees.prompt_of_candidate, weights=ESTIMATORS[name](scored, EPSILON).advantage[:, 0]
    )
    np.testing.assert_allclose(total, 0, atol=1e-5)


@pytest.mark.slow
@given(rewards=reward_groups)
def test_advantages_equal_their_definitions(score_leaves: Grow, rewards: list[list[float]]) -> None:
    scored = score_leaves([range(len(group)) for group in rewards], rewards)
    spread = [np.std(group, ddof=1) if len(group) > 1 else 0.0 for group in rewards]
    standard = [
        (reward - np.mean(group)) / (std + EPSILON)
        for group, std in zip(rewards, spread, strict=True)
        for reward in group
    ]
    centered = [reward - np.mean(group) for group in rewards for reward in group]
    others = [
        reward - sum([*group[:i], *group[i + 1 :]]) / (len(group) - 1) if len(group) > 1 else 0.0
        for group in rewards
        for i, reward in enumerate(group)
    ]
    expected = {"group": standard, "dapo": standard, "drgrpo": centered, "leave_one_out": others}
    for name in WHOLE:
        np.testing.assert_allclose(
            ESTIMATORS[name](scored, EPSILON).advantage[:, 0], expected[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", OF_SEARCHES)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [-3.7]])
def test_a_group_without_spread_has_advantage_exactly_zero(
    score_leaves: Grow, name: str, rewards: list[float]
) -> None:
    scored = score_leaves([range(len(rewards))], [rewards])
    assert not ESTIMATORS[name](scored, EPSILON).advantage.any()


def test_weights_sum_over_tokens_as_each_estimator_says(score_random: Grow) -> None:
    scored = score_random([5, 1, 7])
    length = candidate_lengths(scored.trees)
    assert len(set(length.tolist())) > 1
    total = {name: ESTIMATORS[name](scored, EPSILON).weight.sum(1) for name in OF_SEARCHES}
    np.testing.assert_allclose(total["group"], 1 / 13, rtol=1e-6)
    np.testing.assert_allclose(total["leave_one_out"], 1 / 13, rtol=1e-6)
    np.testing.assert_allclose(total["dapo"], length / length.sum(), rtol=1e-6)
    np.testing.assert_allclose(total["drgrpo"], length / (13 * length.max()), rtol=1e-6)


def test_a_candidate_of_one_token_alone_in_the_batch_weighs_one(score_leaves: Grow) -> None:
    scored = score_leaves([[0]])
    short = replace(scored, trees=replace(scored.trees, candidate=np.array([1])))
    for name in WHOLE:
        assert ESTIMATORS[name](short, EPSILON).weight.tolist() == [[1.0]]


@pytest.mark.parametrize("name", [*WHOLE, "blend"])
def test_credit_is_zero_past_the_end_of_a_candidate_and_constant_before(
    score_random: Grow, name: str
) -> None:
    scored = score_random([6, 6])
    credit, inside = ESTIMATORS[name](scored, EPSILON), scored.trees.paths() >= 0
    assert not credit.weight[~inside].any()
    for values in (credit.weight, credit.advantage):
        np.testing.assert_array_equal(values, np.where(inside, values[:, :1], 0))


@pytest.mark.parametrize("name", OF_SEARCHES)
def test_prompts_that_share_codes_get_the_advantages_that_they_get_alone(
    score_leaves: Grow, name: str
) -> None:
    groups, rewards = [[0, 1, 2], [0, 1, 5, 6]], [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.2]]
    scored = score_leaves(groups, rewards)
    together = ESTIMATORS[name](scored, EPSILON)
    alone = [ESTIMATORS[name](arrays.select(scored, np.array([row])), EPSILON) for row in (0, 1)]
    np.testing.assert_array_equal(
        together.advantage, np.concatenate([credit.advantage for credit in alone])
    )


def test_statistics_count_groups_hits_and_distinct_candidates(score_leaves: Grow) -> None:
    rewards = [[1, 0.5], [0, 0], [0], [0, 1, 1]]
    scored = score_leaves([[0, 1], [2, 2], [0], [4, 0, 0]], rewards)
    statistics = group_statistics(scored)
    score = np.exp(scored.trees.score)
    distinct = score[[0, 1, 2, 4, 5, 6]]
    assert statistics == pytest.approx(
        {
            "zero_spread_share": 0.5,
            "hit_share": 0.5,
            "reward_mean": 3.5 / 8,
            "mean_rule": 3 / 8,
            "distinct_share": 6 / 8,
            "probability_mass": distinct.sum() / 4,
        }
    )


def test_statistics_of_groups_without_candidates_or_hits_are_left_out(score_leaves: Grow) -> None:
    assert group_statistics(score_leaves([[], []])) == {}
    scored = score_leaves([[], [0, 1]], [[], [0.5, 2.0]])
    statistics = group_statistics(replace(scored, parts={"transition": scored.reward}))
    assert "hit_share" not in statistics
    assert statistics["mean_transition"] == pytest.approx(1.25)
    assert statistics["zero_spread_share"] == 0.0  # of the one group that has candidates
