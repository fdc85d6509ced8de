"""The gate: what keeps a policy from being published, and what takes one back."""

from dataclasses import replace

import pytest

from cluster.loop.gate import Measured, prediction_interval, reasons_against, watch
from orchard.evaluation.bootstrap import Estimate
from orchard.settings.loop import LoopConfig

SETTINGS = LoopConfig()


def estimate(mean: float, half: float = 0.1, n: int = 100) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=n)


SERVING = Measured(reward=estimate(1.0), effective=100.0, entropy=2.0, coverage=40)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward": estimate(0.95)}, None),  # below the mean, but not below the lower bound
        ({"reward": estimate(0.89)}, "below the lower bound 0.9000"),
        ({"reward": estimate(float("nan"))}, "estimated reward nan"),
        ({"effective": 19.0}, "19.0 effective draws, fewer than loop.min_draws = 20"),
        ({"entropy": 0.9}, "0.900 nats, below 0.5 times 2.000"),
        ({"coverage": 19}, "19 distinct items, fewer than 0.5 times 40"),
        ({"illegal": 1}, "1 items of its lists may not be shown"),
    ],
)
def test_each_condition_refuses_with_its_reason(
    changes: dict[str, object], told: str | None
) -> None:
    reasons = reasons_against(replace(SERVING, **changes), SERVING, SETTINGS)  # type: ignore[arg-type]
    if told is None:
        assert reasons == ()
    else:
        assert len(reasons) == 1
        assert told in reasons[0]


def test_guards_are_settable() -> None:
    narrow = replace(SERVING, entropy=0.0, coverage=0, effective=5.0)
    assert len(reasons_against(narrow, SERVING, SETTINGS)) == 3
    lax = LoopConfig(min_entropy=0.0, min_coverage=0.0, min_draws=1)
    assert reasons_against(narrow, SERVING, lax) == ()


def test_the_interval_of_a_mean_to_come_holds_both_spreads() -> None:
    low, high = prediction_interval(estimate(1.0, 0.3), estimate(5.0, 0.4))
    assert (low, high) == pytest.approx((0.5, 1.5))


@pytest.mark.parametrize(
    ("realized", "place"),
    [
        (estimate(1.0), "inside"),
        (estimate(0.87), "inside"),
        (estimate(0.85), "below"),
        (estimate(1.15), "above"),
        (estimate(0.0, n=19), "too few"),
        (None, "too few"),
    ],
)
def test_a_realized_reward_is_placed(realized: Estimate | None, place: str) -> None:
    assert watch(estimate(1.0), realized, SETTINGS) == place
