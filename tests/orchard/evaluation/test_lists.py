"""Weights of positions against the truth of a world whose lists can be enumerated."""

import itertools

import numpy as np
import pytest

from orchard.errors import DataError
from orchard.evaluation.lists import cascade_weights, inclusion, independent_weights

BEHAVIOR = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
TARGET = np.array([0.1, 0.2, 0.3, 0.15, 0.25])


def lists(length: int) -> np.ndarray:
    """All ordered lists of distinct items."""
    return np.array(list(itertools.permutations(range(5), length)))


def chance(policy: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The probability of each list by drawing without replacement."""
    found = []
    for row in drawn:
        left, product = 1.0, 1.0
        for item in row:
            product *= policy[item] / left
            left -= policy[item]
        found.append(product)
    return np.array(found)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_under_a_cascade_the_estimate_is_the_truth(length: int) -> None:
    drawn = lists(length)
    # What a position earns depends on all items up to it, not on later ones.
    earned = np.stack(
        [np.sin(1 + (drawn[:, : k + 1] * [3, 7, 11][: k + 1]).sum(1)) for k in range(length)], 1
    )
    weight = cascade_weights(np.log(TARGET)[drawn], np.log(BEHAVIOR)[drawn])
    estimate = (chance(BEHAVIOR, drawn)[:, None] * weight * earned).sum()
    truth = (chance(TARGET, drawn)[:, None] * earned).sum()
    assert estimate == pytest.approx(truth, abs=1e-12)
    unweighted = (chance(BEHAVIOR, drawn)[:, None] * earned).sum()
    assert unweighted != pytest.approx(truth, abs=1e-2)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_of_independent_items_the_estimate_is_the_truth(length: int) -> None:
    drawn, worth = lists(length), np.array([0.0, 1.0, 0.2, 0.9, 0.4])
    # All items are known: those that were not drawn stand behind the list.
    behind = np.array([[i for i in range(5) if i not in row] for row in drawn.tolist()])
    every = np.concatenate([drawn, behind], 1)
    draws = np.full(len(drawn), length)
    probability = [inclusion(np.log(p)[every], draws) for p in (TARGET, BEHAVIOR)]
    weight = (probability[0] / probability[1])[:, :length]
    estimate = (chance(BEHAVIOR, drawn)[:, None] * weight * worth[drawn]).sum()
    truth = (chance(TARGET, drawn)[:, None] * worth[drawn]).sum()
    assert estimate == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_inclusion_is_that_of_the_enumerated_lists(length: int) -> None:
    drawn = lists(length)
    found = inclusion(np.log(BEHAVIOR)[None], np.array([length]))[0]
    probability = chance(BEHAVIOR, drawn)
    wanted = [probability[(drawn == item).any(1)].sum() for item in range(5)]
    np.testing.assert_allclose(found, wanted, atol=1e-7)


@pytest.mark.slow
def test_unlisted_items_count_as_many_small_ones() -> None:
    rng = np.random.default_rng(0)
    policy = np.sort(rng.dirichlet(np.full(400, 0.5)))[::-1]
    noisy = np.log(policy) + rng.gumbel(size=(20_000, len(policy)))
    drawn = np.argsort(-noisy, axis=1)[:, :8]
    frequency = np.bincount(drawn.ravel(), minlength=len(policy)) / len(noisy)
    found = inclusion(np.log(policy[:8])[None], np.array([8]))[0]
    np.testing.assert_allclose(found, frequency[:8], rtol=0.05)


def test_lists_may_differ_in_length_and_one_draw_needs_no_assumption() -> None:
    behavior = np.log(np.array([[0.5, 0.25], [0.25, 0.0 + 1e-300]]))
    behavior[1, 1] = -np.inf
    target = np.log(np.array([[0.25, 0.5], [0.5, 0.5]]))
    for weights in (cascade_weights, independent_weights):
        found = weights(target, behavior)
        assert found[1].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
        alone = weights(target[1:, :1], behavior[1:, :1])
        np.testing.assert_allclose(alone, found[1:, :1], atol=1e-6)
    with pytest.raises(DataError, match="probability 1.5 together"):
        cascade_weights(np.log(np.array([[0.75, 0.75]])), behavior[:1])
