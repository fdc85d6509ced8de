"""Sentences of the report: what changed, and what the log suggests."""

import numpy as np

from cluster.report.verdict import advice, paid, verdict
from orchard.evaluation.bootstrap import Estimate
from orchard.tracking.metrics_log import Series


def series(*values: float) -> Series:
    steps = np.arange(1, len(values) + 1)
    return Series(step=steps, time=steps.astype(np.float64), value=np.array(values))


def test_what_rose_fell_and_stayed_is_said() -> None:
    change = {
        "ndcg@10/sid": Estimate(mean=0.012, low=0.0074, high=0.0165, n=100),
        "hr@1/sid": Estimate(mean=-0.004, low=-0.007, high=-0.001, n=100),
        "hr@10/sid": Estimate(mean=0.001, low=-0.002, high=0.004, n=100),
        "hr@50/sid": Estimate(mean=-0.0054, low=-0.0148, high=0.0044, n=100),
    }
    assert verdict({"trained - warm_start": change, "other": {}}) == [
        "trained - warm_start: NDCG@10 rose by .0120 [.0074, .0165], HR@1 fell by .0040 [.0010, "
        ".0070], no clear change of HR@10 and HR@50."
    ]
    both = verdict({"trained_guided - a": change, "trained_all - a": change, "trained - a": change})
    assert [sentence.split(":")[0] for sentence in both] == ["trained_guided - a", "trained - a"]
    del change["hr@10/sid"], change["hr@50/sid"]
    assert "no clear change" not in verdict({"a": change})[0]


def test_a_healthy_log_suggests_nothing() -> None:
    log = {
        "rewards/hit_rate": series(0.2, 0.2, 0.2),
        "rollout/hit_share_valid": series(0.19, 0.2, 0.18),
        "rewards/zero_spread_share": series(0.3, 0.3, 0.3),
        "learner/kl": series(0.01, 0.02, 0.03),
        "learner/entropy": series(2.0, 1.9, 1.8),
    }
    assert advice(log) == []
    assert advice({}) == []


def test_each_pattern_is_named_with_its_remedy() -> None:
    log = {
        "rewards/hit_rate": series(0.6, 0.6, 0.6),
        "rollout/hit_share_valid": series(float("nan"), 0.2, 0.2, 0.2),
        "rewards/zero_spread_share": series(0.9, 0.9, 0.9),
        "learner/kl": series(0.01, 0.5, 0.9),
        "learner/entropy": series(2.0, 1.0, 0.1),
    }
    found = advice(log)
    assert [item.page for item in found] == ["section 3", "section 2", "section 4", "section 4"]
    assert "60% of cases, groups of held-out rows in 20%" in found[0].sign
    assert "data.fresh" in found[0].remedy
    assert advice({"rewards/zero_spread_share": series(0.9, 0.9)}) == []  # too few to judge by


def test_the_mean_reward_is_explained_by_its_weights() -> None:
    assert paid({"rule": 1.0, "transition": 0.5, "prefix": 0.0}).startswith(
        "The mean reward is 1 x rule + 0.5 x transition,"
    )
    assert paid({}) == ""
