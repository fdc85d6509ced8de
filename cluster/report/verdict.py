"""Say in sentences what the evaluations of a run show, and what its log suggests to try next."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cluster.console import interval
from orchard.evaluation.bootstrap import Estimate
from orchard.tracking.metrics_log import Series

Metrics = Mapping[str, Series]
WATCHED = {"ndcg@10/sid": "NDCG@10", "hr@1/sid": "HR@1", "hr@10/sid": "HR@10", "hr@50/sid": "HR@50"}
"""Metrics that the verdict names, and their usual names."""
MAIN = ("trained", "trained_guided")
"""Evaluations whose comparisons the verdict tells."""
_EMPTY = 0.8
_KNOWN = 1.5
_FAR_FROM_REFERENCE = 0.5
_COLLAPSED = 0.3
_FEW = 3
"""Number of entries that are enough to judge a series by."""


class Advice(NamedTuple):
    """Pattern in the log, and what to try."""

    sign: str
    remedy: str
    page: str
    """Section of the page `docs/troubleshooting.md` that goes further."""


def verdict(changes: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """Return a sentence for each main comparison: what rose, what fell, what did not change.

    The main ones are those of the trained policy, with and without its guide; the first one in a
    run that has neither.
    """
    told = {name: c for name, c in changes.items() if c.keys() & WATCHED.keys()}
    main = [name for name in told if name.split()[0] in MAIN] or list(told)[:1]
    return [f"{name}: {_sentence(told[name])}." for name in main]


def _sentence(change: Mapping[str, Estimate]) -> str:
    """Return what rose, fell and did not change clearly."""
    told = [(label, change[metric]) for metric, label in WATCHED.items() if metric in change]
    clear = [(label, estimate) for label, estimate in told if estimate.significant]
    parts = [
        f"{label} rose by {interval(estimate)}"
        if estimate.mean > 0
        else f"{label} fell by {interval(_negated(estimate))}"
        for label, estimate in clear
    ]
    unclear = [label for label, estimate in told if not estimate.significant]
    if unclear:
        listed = " and ".join([", ".join(unclear[:-1]), unclear[-1]] if unclear[1:] else unclear)
        parts.append(f"no clear change of {listed}")
    return ", ".join(parts)


def _negated(estimate: Estimate) -> Estimate:
    return replace(estimate, mean=-estimate.mean, low=-estimate.high, high=-estimate.low)


def advice(train: Metrics) -> list[Advice]:
    """Return what the log of the RL phase suggests, in the order in which to rule causes out."""
    found: list[Advice] = []
    empty, hits = _mean(train, "rewards/zero_spread_share"), _mean(train, "rewards/hit_rate")
    held_out = _mean(train, "rollout/hit_share_valid")
    if hits is not None and held_out and hits > _KNOWN * held_out:
        found.append(Advice(
            f"Groups of training rows contain the target in {hits:.0%} of cases, groups of "
            f"held-out rows in {held_out:.0%}: the policy has memorized its training rows.",
            "Give RL rows that SFT has not seen (data.fresh, data.hold_back), or fewer sft.epochs.",
            "section 3",
        ))  # fmt: skip
    if empty is not None and empty > _EMPTY:
        found.append(Advice(
            f"In {empty:.0%} of the groups, all candidates have the same reward: no gradient.",
            "Try a larger rollout.group_size, rollout.hints, learner.max_draws, or a reward with "
            "partial credit.",
            "section 2",
        ))  # fmt: skip
    kl = _tail(train, "learner/kl")
    if kl is not None and kl > _FAR_FROM_REFERENCE:
        found.append(Advice(
            f"The KL to the reference is {kl:.2g} at the end.",
            "If held-out quality falls, raise learner.kl.weight or lower learner.lr.",
            "section 4",
        ))  # fmt: skip
    entropy, last = _head(train, "learner/entropy"), _tail(train, "learner/entropy")
    if entropy and last is not None and last < _COLLAPSED * entropy:
        found.append(Advice(
            f"The entropy of a choice fell from {entropy:.2f} to {last:.2f}.",
            "Candidates may be copies of each other: use rollout.search = beam or beam_sample, or "
            "raise learner.kl.weight.",
            "section 4",
        ))  # fmt: skip
    return found


def _finite(metrics: Metrics, name: str) -> np.ndarray | None:
    """Return the finite values of a metric, None if they are too few to judge by."""
    if name not in metrics:
        return None
    value = metrics[name].value[np.isfinite(metrics[name].value)]
    return value if len(value) >= _FEW else None


def _mean(metrics: Metrics, name: str) -> float | None:
    value = _finite(metrics, name)
    return None if value is None else float(value.mean())


def _head(metrics: Metrics, name: str) -> float | None:
    value = _finite(metrics, name)
    return None if value is None else float(value[: max(1, len(value) // 10)].mean())


def _tail(metrics: Metrics, name: str) -> float | None:
    value = _finite(metrics, name)
    return None if value is None else float(value[-max(1, len(value) // 10) :].mean())


def paid(weights: Mapping[str, float]) -> str:
    """Return what the mean reward is made of, from `rewards.weights`; empty if unknown."""
    used: Sequence[str] = [f"{value:g} x {name}" for name, value in weights.items() if value]
    if not used:
        return ""
    return (
        f"The mean reward is {' + '.join(used)}, over all candidates; each part is logged before "
        "it is weighted."
    )
