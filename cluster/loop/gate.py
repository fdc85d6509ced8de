"""Decide whether a policy may be published, and whether one that was published may stay.

The gate compares two policies on the same logged draws: the candidate passes if its estimate is not
below the lower bound of the policy that is served, and if its searches have not narrowed. After it
was published, the reward that it earns must not lie below what was predicted.
"""

import math
from dataclasses import dataclass

from cluster.loop.state import Watch
from orchard.evaluation.bootstrap import Estimate
from orchard.settings.loop import LoopConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of a policy before it is published."""

    reward: Estimate
    """Off-policy estimate of its reward per draw."""
    effective: float
    """Effective number of draws of the estimate."""
    entropy: float
    """Mean entropy of the first code after the histories of the window, in nats."""
    coverage: int
    """Number of distinct items in its lists for those histories."""
    illegal: int = 0
    """Number of items in those lists that may not be shown."""


def reasons_against(
    candidate: Measured, serving: Measured, settings: LoopConfig
) -> tuple[str, ...]:
    """Return why a candidate may not be published, one sentence each; none if it may."""
    reasons: list[str] = []
    if candidate.effective < settings.min_draws:
        reasons.append(
            f"the estimate has {candidate.effective:.1f} effective draws, fewer than "
            f"loop.min_draws = {settings.min_draws}"
        )
    if not candidate.reward.mean >= serving.reward.low:
        reasons.append(
            f"the estimated reward {candidate.reward.mean:.4f} is below the lower bound "
            f"{serving.reward.low:.4f} of the policy that is served"
        )
    if candidate.illegal:
        reasons.append(f"{candidate.illegal} items of its lists may not be shown")
    if not candidate.entropy >= settings.min_entropy * serving.entropy:
        reasons.append(
            f"the entropy of its first code is {candidate.entropy:.3f} nats, below "
            f"{settings.min_entropy:g} times {serving.entropy:.3f}"
        )
    if not candidate.coverage >= settings.min_coverage * serving.coverage:
        reasons.append(
            f"its lists hold {candidate.coverage} distinct items, fewer than "
            f"{settings.min_coverage:g} times {serving.coverage}"
        )
    return tuple(reasons)


def prediction_interval(predicted: Estimate, realized: Estimate) -> tuple[float, float]:
    """Return the 95 % interval of the mean reward of as many draws as were realized.

    The spread of the prediction and that of a mean of so many draws are independent, so that their
    half widths add in squares.
    """
    spread_low = realized.high - realized.mean
    spread_high = realized.mean - realized.low
    low = predicted.mean - math.hypot(predicted.mean - predicted.low, spread_low)
    high = predicted.mean + math.hypot(predicted.high - predicted.mean, spread_high)
    return low, high


def watch(predicted: Estimate, realized: Estimate | None, settings: LoopConfig) -> Watch:
    """Place the realized reward of a published policy relative to its prediction interval."""
    if realized is None or realized.n < settings.min_draws:
        return "too few"
    low, high = prediction_interval(predicted, realized)
    if realized.mean < low:
        return "below"
    return "above" if realized.mean > high else "inside"
