"""Advantage estimators: how much each candidate is better than the rest of its group.

A group is the candidates of one prompt, whatever their number. These estimators compare within the
group; they differ in whether the spread is divided out and in how tokens are weighted. With N
candidates in the batch, |y| tokens in a candidate and mu, sigma of its group:

    group           (R - mu) / (sigma + eps)     1 / (N |y|)         GRPO, arXiv 2402.03300
    dapo            (R - mu) / (sigma + eps)     1 / sum of |y|      DAPO, arXiv 2503.14476
    drgrpo          R - mu                       1 / (N max |y|)     Dr. GRPO, arXiv 2503.20783
    leave_one_out   R - mean of the others       1 / (N |y|)         RLOO, arXiv 2402.14740

|y| counts forced codes: their log-probability is 0 and they carry no gradient, but a candidate's
length must not depend on how bushy the catalog is around it. N is that of the whole batch before
it is cut for workers or micro-batches, so the parts' losses add up.

`sibling` compares below the group, node by node (`learner.advantage.sibling`), and two estimators
combine it with `group`: `group_sibling` adds the two losses, `blend` averages the two advantages.
`step` compares step by step (`learner.advantage.sapo`).

Shapes:  B prompts   N nodes   C candidates   K steps of the longest candidate
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Float64, Int64

from learner.advantage.groups import group_center, group_normalize
from learner.advantage.sapo import apply_code_switches, sapo, well_formed
from learner.advantage.sibling import sibling
from orchard.settings import LearnerConfig
from orchard.types import Advantages, ScoredTrees, SearchTrees

Estimator = Callable[[ScoredTrees, float], Advantages]
"""Scored trees and the epsilon beside a standard deviation to a verdict."""


def candidate_lengths(trees: SearchTrees) -> Int64[np.ndarray, " C"]:
    """Number of tokens of each candidate, forced ones included."""
    path = trees.paths()
    return np.where(path >= 0, np.diff(trees.token_start)[path], 0).sum(1)


def group(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardised within the group; every candidate weighs the same."""
    return broadcast_to_steps(
        scored, group_normalize(*_by_group(scored), std_epsilon), mean_weight(scored)
    )


def dapo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardised within the group; every token of the batch weighs the same."""
    length = candidate_lengths(scored.trees)
    weight = np.full(len(length), 1 / max(1, length.sum()))
    return broadcast_to_steps(scored, group_normalize(*_by_group(scored), std_epsilon), weight)


def drgrpo(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Centred within the group but not divided by its spread; `std_epsilon` plays no part."""
    length = candidate_lengths(scored.trees)
    weight = np.full(len(length), 1 / max(1, len(length) * length.max(initial=0)))
    return broadcast_to_steps(scored, group_center(*_by_group(scored)), weight)


def leave_one_out(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Against the mean of the other candidates; `std_epsilon` plays no part."""
    size = np.diff(scored.trees.candidate_start)[scored.trees.prompt_of_candidate]
    # R - (sum - R) / (G - 1) = (R - mu) G / (G - 1); alone in its group R - mu is already 0.
    advantage = group_center(*_by_group(scored)) * size / np.maximum(size - 1, 1)
    return broadcast_to_steps(scored, advantage, mean_weight(scored))


def blend(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Half of `group`, half of the mean of `sibling` over steps; candidates weigh the same."""
    whole, nodes = group(scored, std_epsilon), sibling(scored, std_epsilon)
    steps = np.maximum(1, (scored.trees.paths() >= 0).sum(1))
    mean = nodes.advantage.astype(np.float64).sum(1) / steps
    advantage = 0.5 * whole.advantage[:, 0] + 0.5 * mean
    return broadcast_to_steps(scored, advantage, mean_weight(scored))


ESTIMATORS: dict[str, Estimator] = {
    "group": group,
    "dapo": dapo,
    "drgrpo": drgrpo,
    "leave_one_out": leave_one_out,
    "sibling": sibling,
    "blend": blend,
    "sapo": sapo,
}
"""By the name in `learner.estimator`. To add one, write a function of the type `Estimator`, list it
here and add its name to the choices of that setting."""

SUMS: dict[str, tuple[str, ...]] = {"group_sibling": ("group", "sibling")}
"""Estimators whose losses add up, under further names of that setting; the first of them weighs the
divergence from the reference."""


def compute_advantages(scored: ScoredTrees, config: LearnerConfig) -> list[Advantages]:
    """The credits of a batch by the configured estimator; their losses add up."""
    if config.estimator == "sapo":
        return _by_steps(scored, config)
    names = SUMS.get(config.estimator, (config.estimator,))
    credits = [ESTIMATORS[name](scored, config.std_epsilon) for name in names]
    return credits[:1] + [
        replace(credit, weight=credit.weight * np.float32(config.sibling_weight))
        for credit in credits[1:]
    ]


def _by_steps(scored: ScoredTrees, config: LearnerConfig) -> list[Advantages]:
    """The credit of `step` as switched, and that of the format if it counts."""
    credits = [apply_code_switches(scored, sapo(scored, config.std_epsilon), config.sapo)]
    if config.sapo.format_weight:
        assert scored.step_reward is not None
        formed = well_formed(scored.trees, scored.step_reward.shape[1]).astype(np.float32)
        form = group(replace(scored, reward=formed), config.std_epsilon)
        form = apply_code_switches(
            scored, form, config.sapo.model_copy(update={"sid_token_weight": 1.0})
        )
        credits.append(replace(form, weight=form.weight * np.float32(config.sapo.format_weight)))
    return credits


def group_statistics(scored: ScoredTrees) -> dict[str, float]:
    """What the groups have to teach, for the log.

    `zero_spread_share`: groups whose rewards are all equal, hence without gradient. `hit_share`:
    groups that hold their target (where the part "rule" is scored). `reward_mean`, and `mean_NAME`
    of each part. `distinct_share`: distinct leaves per candidate. `probability_mass`: probability
    of a group's distinct leaves under the policy that found them, averaged over prompts; near 1
    the search leaves nothing to be found.
    """
    trees = scored.trees
    prompt = trees.prompt_of_candidate
    occupied = np.flatnonzero(np.diff(trees.candidate_start))
    first = trees.candidate_start[occupied]
    if len(occupied) == 0:
        return {}
    spread = np.maximum.reduceat(scored.reward, first) - np.minimum.reduceat(scored.reward, first)
    _, distinct = np.unique(np.stack([prompt, trees.leaf]), axis=1, return_index=True)
    mass = np.exp(trees.score[distinct].astype(np.float64)).sum() / len(occupied)
    statistics = {
        "zero_spread_share": float((spread == 0).mean()),
        "reward_mean": float(scored.reward.mean()),
        "distinct_share": len(distinct) / len(prompt),
        "probability_mass": float(mass),
    }
    if "rule" in scored.parts:
        hit = np.maximum.reduceat(scored.parts["rule"], first) > 0
        statistics["hit_share"] = float(hit.mean())
    return statistics | {f"mean_{name}": float(part.mean()) for name, part in scored.parts.items()}


def _by_group(
    scored: ScoredTrees,
) -> tuple[Float32[np.ndarray, " C"], Int64[np.ndarray, " C"], int]:
    """Rewards, the group of each, and how many groups there are."""
    return scored.reward, scored.trees.prompt_of_candidate, len(scored.trees)


def mean_weight(scored: ScoredTrees) -> Float64[np.ndarray, " C"]:
    """Weight of each token such that every candidate weighs 1 / N in all."""
    length = candidate_lengths(scored.trees)
    return 1 / np.maximum(1, length * len(length))


def broadcast_to_steps(
    scored: ScoredTrees,
    advantage: Float64[np.ndarray, " C"],
    weight: Float64[np.ndarray, " C"],
) -> Advantages:
    """The same advantage and weight at every step that a candidate has."""
    inside = scored.trees.paths() >= 0
    return Advantages(
        advantage=np.where(inside, advantage[:, None], 0).astype(np.float32),
        weight=np.where(inside, weight[:, None], 0).astype(np.float32),
    )
