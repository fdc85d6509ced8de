"""Test the estimators that select negatives, against loops over candidates and pairs."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS, candidate_lengths, compute_advantages
from learner.advantage.negatives import boundary_pairs, windowed_advantages
from learner.batch.pack import make_batch
from orchard.config import parse
from orchard.errors import ConfigError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.types import ScoredTrees

Grow = Callable[..., ScoredTrees]
EPSILON = 1e-4
groups_of_candidates = st.lists(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -0.25]), st.sampled_from([-1.0, -2.0, -0.5, -3.0])),
        min_size=1,
        max_size=7,
    ),
    min_size=1,
    max_size=4,
)
Group = list[tuple[float, float]]
"""Rewards and log-probabilities of candidates."""


def arrays(groups: list[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    reward = np.array([reward for group in groups for reward, _ in group], np.float32)
    score = np.array([score for group in groups for _, score in group], np.float32)
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return reward, score, owner, len(groups)


def pair_of(group: Group) -> tuple[int, int] | None:
    """Indices of the strongest positive and of the hardest negative."""
    best = max(reward for reward, _ in group)
    positive = negative = None
    for i, (reward, score) in enumerate(group):
        if reward == best and (positive is None or score > group[positive][1]):
            positive = i
        if reward < best and (negative is None or score > group[negative][1]):
            negative = i
    return None if positive is None or negative is None else (positive, negative)


@pytest.mark.slow
@given(groups=groups_of_candidates)
def test_the_boundary_is_the_likeliest_positive_and_the_likeliest_negative(
    groups: list[Group],
) -> None:
    advantage, chosen = boundary_pairs(*arrays(groups), EPSILON)
    expected, mask = list[float](), list[bool]()
    for group in groups:
        values, marks, pair = [0.0] * len(group), [False] * len(group), pair_of(group)
        if pair is not None:
            two = [group[i][0] for i in pair]
            for i in pair:
                values[i] = (group[i][0] - np.mean(two)) / (np.std(two, ddof=1) + EPSILON)
                marks[i] = True
        expected, mask = expected + values, mask + marks
    assert chosen.tolist() == mask
    np.testing.assert_allclose(advantage, expected, rtol=1e-9, atol=1e-12)


def windowed(group: Group, low: float, high: float) -> list[float]:
    """Advantages by numeric integration of each negative's weight over the window."""
    best = max(reward for reward, _ in group)
    negatives = [i for i, (reward, _) in enumerate(group) if reward < best]
    ranked = sorted(negatives, key=lambda i: (-group[i][1], i))
    weight = [1.0] * len(group)
    for j, i in enumerate(ranked):
        first, last = j / len(ranked), (j + 1) / len(ranked)
        weight[i] = max(0.0, min(last, high) - max(first, low)) * len(ranked)
    if not any(weight[i] for i in negatives):
        return [0.0] * len(group)
    total = sum(weight)
    mean = sum(w * reward for w, (reward, _) in zip(weight, group, strict=True)) / total
    square = sum(w * (reward - mean) ** 2 for w, (reward, _) in zip(weight, group, strict=True))
    std = np.sqrt(square / max(total - 1, 1))
    return [
        w * (reward - mean) / (std + EPSILON) for w, (reward, _) in zip(weight, group, strict=True)
    ]


@pytest.mark.slow
@given(groups=groups_of_candidates, edges=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_window_weighs_negatives_by_their_share_in_it(
    groups: list[Group], edges: tuple[float, float]
) -> None:
    low, high = min(edges), max(edges)
    if high - low < 1e-3:
        return
    found = windowed_advantages(*arrays(groups), EPSILON, (low, high))
    expected = [value for group in groups for value in windowed(group, low, high)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    total = np.bincount(arrays(groups)[2], found)
    np.testing.assert_allclose(total, 0, atol=1e-9)


def test_a_window_of_binary_rewards_has_the_gradient_of_its_partial_auc() -> None:
    # Each positive gains from every negative in the window what the negative loses.
    group = [(0.0, -0.1), (1.0, -0.2), (0.0, -0.3), (0.0, -0.4), (0.0, -0.5)]
    found = windowed_advantages(*arrays([group]), EPSILON, (0.25, 0.75))
    assert found[0] == found[4] == 0
    assert found[2] == found[3] < 0
    assert found[1] == pytest.approx(-found[2] - found[3])


def test_the_whole_window_is_the_group(score_random: Grow) -> None:
    scored = score_random([5, 1, 7])
    whole, group = (ESTIMATORS[name](scored, EPSILON) for name in ("window", "group"))
    np.testing.assert_allclose(whole.advantage, group.advantage, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(whole.weight, group.weight)


def test_the_window_of_the_settings_is_the_one_applied(score_random: Grow) -> None:
    scored = score_random([5, 7])
    config = LearnerConfig(estimator="window", window=(0.0, 0.3))
    (credit,) = compute_advantages(scored, config)
    expected = windowed_advantages(
        scored.reward, scored.trees.score, scored.trees.prompt_of_candidate, 2,
        config.std_epsilon, (0.0, 0.3),
    )  # fmt: skip
    np.testing.assert_array_equal(credit.advantage[:, 0], expected.astype(np.float32))
    assert (credit.advantage[:, 0] == 0).any()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_batch_of_boundaries_holds_two_candidates_of_each_group(
    score_leaves: Grow, policy: tuple[PreTrainedModel, ItemTokenizer], ratio: str
) -> None:
    scored = score_leaves([[0, 1, 2, 9], [3, 4, 5], [6, 7]], [[0, 1, 0, 0], [0, 0, 1], [0, 0]])
    config = LearnerConfig.model_validate({"estimator": "boundary", "ratio": ratio})
    batch = make_batch(scored, policy[1], config)
    (credit,) = compute_advantages(scored, config)
    used = np.flatnonzero(credit.weight.any(1))
    assert used.tolist() == sorted(
        {
            1, max((0, 2, 3), key=lambda i: scored.trees.score[i]),
            6, max((4, 5), key=lambda i: scored.trees.score[i]),
        }
    )  # fmt: skip
    lengths = candidate_lengths(scored.trees)
    np.testing.assert_allclose(credit.weight[used].max(1), 1 / (6 * lengths[used]), rtol=1e-6)
    path = scored.trees.paths()[used]
    nodes = np.unique(path[path >= 0])
    forced = scored.trees.forced[scored.trees.token_start[nodes]]
    assert len(batch.row) == (~forced).sum()
    assert set(batch.row.tolist()) == {0, 1}
    assert not batch.subtree_end[2].any()  # the group without a spread takes no slot
    if ratio == "sequence":
        assert batch.sequences is not None
        assert len(batch.sequences.row) == 4
        assert batch.sequences.advantage.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("window", [[0.5, 0.5], [0.6, 0.2], [0.0, 1.5]])
def test_a_window_without_width_is_refused(window: list[float]) -> None:
    with pytest.raises(ConfigError, match="window"):
        parse({"name": "x", "data": {"path": "d"}, "learner": {"window": window}})
