"""Experts with scores that no logarithm takes, and prompts that none of them knows."""

import numpy as np
import pytest

from orchard.errors import ConfigError
from orchard.guide.expert import Expert, expert_scores


def expert(*strength: float, decay: float = 1.0) -> Expert:
    """Return an expert with pairs of leaf 0 alone."""
    count = len(strength)
    return Expert(
        name="mine",
        start=np.array([0, *([count] * 3)]),
        after=np.arange(count, dtype=np.int32),
        strength=np.array(strength, np.float32),
        decay=decay,
    )


@pytest.mark.parametrize("wrong", [-0.5, float("inf"), float("nan")])
def test_scores_that_are_negative_or_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(ConfigError, match=rf"expert mine gives the score {wrong} \(1 of 2 pairs\)"):
        expert(1.0, wrong)


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_outside_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="take 0 to 1"):
        expert(1.0, decay=decay)


def test_a_history_that_is_unknown_reaches_itself_alone() -> None:
    scores = expert_scores(
        [expert(1.0, 0.5)], np.array([0, 1, 2]), np.array([0, 1, 3]), num_leaves=3
    )
    assert scores.known.tolist() == [True, False]
    second = scores.prompt == 1
    assert scores.leaf[second].tolist() == [1, 2]
    assert scores.seen[second].all()
    assert not scores.score[second].any()
