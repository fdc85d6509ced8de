"""Off-policy estimators on a problem small enough to be summed."""

import numpy as np
import pytest

from orchard.errors import DataError
from orchard.evaluation.off_policy import LoggedDecisions, estimate, first_code_model

BEHAVIOUR = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
TARGET = np.array([[0.1, 0.2, 0.7], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]])
FIRST, FIRST_TARGET = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.5, 0.3])
REWARD_1 = np.array([0.2, 0.0, 0.5])
REWARD_2 = np.array([[0.0, 1.0, 0.5], [1.0, 0.0, 0.2], [0.3, 0.9, 0.1]])
TRUTH = float((FIRST_TARGET * (REWARD_1 + (TARGET * REWARD_2).sum(1))).sum())
"""Earnings of the target: two codes of three each, a reward for each of them."""


def logged(number: int, seed: int, *, model: float | None = None) -> LoggedDecisions:
    """Draws of the behaviour policy; the model is the truth times `model`."""
    draw = np.random.default_rng(seed)
    one = draw.choice(3, number, p=FIRST)
    two = (draw.random(number)[:, None] > BEHAVIOUR[one].cumsum(1)).sum(1)
    q = v = None
    if model is not None:
        after = (TARGET * REWARD_2).sum(1)
        q = model * np.stack([REWARD_1[one] + after[one], REWARD_2[one, two]], 1)
        before = np.full(number, (FIRST_TARGET * (REWARD_1 + after)).sum())
        v = model * np.stack([before, after[one]], 1)
    return LoggedDecisions(
        behaviour=np.log(np.stack([FIRST[one], BEHAVIOUR[one, two]], 1)),
        target=np.log(np.stack([FIRST_TARGET[one], TARGET[one, two]], 1)),
        reward=np.stack([REWARD_1[one], REWARD_2[one, two]], 1),
        q=q,
        v=v,
    )


def test_every_estimator_finds_the_value_of_the_target() -> None:
    found = estimate(logged(40_000, 0, model=0.5), resamples=200).value
    for name in ("is", "snips", "pdis", "dr"):
        assert found[name].mean == pytest.approx(TRUTH, abs=0.02), name
        assert found[name].low < TRUTH < found[name].high, name
    assert abs(found["logged"].mean - TRUTH) > 0.05  # the behaviour policy earns something else


def test_without_bias_means_the_exact_mean_over_all_that_may_be_drawn() -> None:
    one, two = (grid.ravel() for grid in np.meshgrid(range(3), range(3), indexing="ij"))
    chance = FIRST[one] * BEHAVIOUR[one, two]
    for model in (0.0, 0.7, 3.0):
        after = (TARGET * REWARD_2).sum(1)
        decisions = LoggedDecisions(
            behaviour=np.log(np.stack([FIRST[one], BEHAVIOUR[one, two]], 1)),
            target=np.log(np.stack([FIRST_TARGET[one], TARGET[one, two]], 1)),
            reward=np.stack([REWARD_1[one], REWARD_2[one, two]], 1),
            q=model * np.stack([REWARD_1[one] + after[one], REWARD_2[one, two]], 1),
            v=model * np.stack([np.full(9, TRUTH), after[one]], 1),
        )
        w, r = decisions.weight, decisions.reward
        assert decisions.q is not None
        assert decisions.v is not None
        after_v = np.concatenate([decisions.v[:, 1:], np.zeros((9, 1))], 1)
        dr = decisions.v[:, 0] + (w * (r + after_v - decisions.q)).sum(1)
        assert float(chance @ (w[:, -1] * r.sum(1))) == pytest.approx(TRUTH, abs=1e-12)
        assert float(chance @ (w * r).sum(1)) == pytest.approx(TRUTH, abs=1e-12)
        assert float(chance @ dr) == pytest.approx(TRUTH, abs=1e-12)


def test_a_good_model_narrows_the_interval_and_a_perfect_one_closes_it() -> None:
    plain = estimate(logged(2000, 1, model=0.0), resamples=300).value
    assert plain["dr"].mean == pytest.approx(plain["pdis"].mean, abs=1e-12)
    perfect = estimate(logged(2000, 1, model=1.0), resamples=300).value
    assert perfect["dr"].mean == pytest.approx(TRUTH, abs=1e-12)
    assert perfect["dr"].high - perfect["dr"].low < 1e-9
    better = estimate(logged(2000, 1, model=0.9), resamples=300).value
    assert better["dr"].high - better["dr"].low < plain["pdis"].high - plain["pdis"].low


def test_intervals_cover_as_often_as_they_say() -> None:
    hits = {"is": 0, "snips": 0, "pdis": 0}
    for seed in range(60):
        found = estimate(logged(400, seed + 10), resamples=200, seed=seed).value
        for name in hits:
            hits[name] += found[name].low <= TRUTH <= found[name].high
    assert all(count >= 51 for count in hits.values()), hits  # 57 expected of 60


def test_the_same_policy_has_weight_one_and_loses_no_decision() -> None:
    decisions = logged(500, 3)
    same = LoggedDecisions(
        behaviour=decisions.behaviour, target=decisions.behaviour, reward=decisions.reward
    )
    found = estimate(same, resamples=100)
    assert found.effective == pytest.approx(500)
    assert found.largest == pytest.approx(1)
    for estimated in found.value.values():
        assert estimated.mean == pytest.approx(float(decisions.reward.sum(1).mean()))


def test_a_counted_model_never_sees_its_own_fold_and_keeps_dr_unbiased() -> None:
    first = np.array([0, 0, 0, 1])
    reward = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0], [2.0, 0.0]])
    root = np.tile([0.25, 0.75], (4, 1))
    q, v = first_code_model(first, reward, np.array([0, 1, 1, 1]), root)
    mean = 10 / 3  # of the other fold
    assert q[0].tolist() == [(8 + mean) / 3] * 2
    assert v[0].tolist() == pytest.approx([0.25 * (8 + mean) / 3 + 0.75 * (2 + mean) / 2, q[0, 0]])
    assert q[3].tolist() == [1.0, 1.0]  # the mean of all stands in for a code not seen

    draws = logged(20_000, 5)
    one = np.searchsorted(np.sort(np.log(FIRST_TARGET)), draws.target[:, 0])
    place = np.argsort(FIRST_TARGET)
    table = np.tile(FIRST_TARGET[place], (20_000, 1))
    q, v = first_code_model(one, draws.reward, np.arange(20_000) % 5, table)
    found = estimate(
        LoggedDecisions(
            behaviour=draws.behaviour, target=draws.target, reward=draws.reward, q=q, v=v
        ),
        resamples=200,
    ).value
    assert found["dr"].mean == pytest.approx(TRUTH, abs=0.03)
    assert found["dr"].high - found["dr"].low < found["is"].high - found["is"].low


def test_what_cannot_be_logged_is_refused() -> None:
    good = logged(5, 0)
    for changes, said in (
        ({"behaviour": np.full((5, 2), 0.5)}, "must not exceed 0"),
        ({"behaviour": np.full((5, 2), -np.inf)}, "probability 0"),
        ({"reward": np.full((5, 2), np.nan)}, "not a finite number"),
    ):
        whole = {"behaviour": good.behaviour, "target": good.target, "reward": good.reward}
        with pytest.raises(DataError, match=said):
            LoggedDecisions(**(whole | changes))
    with pytest.raises(DataError, match="no logged decisions"):
        LoggedDecisions(
            behaviour=np.zeros((0, 2)), target=np.zeros((0, 2)), reward=np.zeros((0, 2))
        )
