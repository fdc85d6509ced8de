"""What a batch of scored trees says about the search that grew them.

Shapes:  C candidates   B groups (prompts)   K steps of the longest candidate
"""

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from orchard.evaluation.ranking import diversity
from orchard.types import ScoredTrees, SearchTrees


def diagnose(scored: ScoredTrees) -> dict[str, float]:
    """Diversity, reach and rank correlations, by name for the log.

    `rewards/best`: the best reward of a group, averaged over groups. `rollout/diversity`: as
    `orchard.evaluation.ranking.diversity`. `rollout/prefixes_L`: distinct prefixes of L steps per
    prompt. `rollout/NAME`: what the search counted (see `rollout.ved`), per prompt.
    `rollout/logprob_spearman_L`, `rollout/value_spearman_L`: rank correlation of the prefixes' log-
    probability and value with the hit of the part "rule" (where it is not scored, the reward),
    averaged over the prompts where both vary; left out where there is none. A ranking penalty would
    set likelihood against itself.
    """
    trees = scored.trees
    num_prompts, path = len(trees), trees.paths()
    occupied = np.diff(trees.candidate_start) > 0
    if not occupied.any():
        return {}
    best = np.maximum.reduceat(scored.reward, trees.candidate_start[:-1][occupied])
    figures = {
        "rewards/best": float(best.mean()),
        "rollout/diversity": diversity(path=_codes(trees, path), start=trees.candidate_start),
    }
    for step, count in enumerate(np.bincount(trees.step)[1:], 1):
        figures[f"rollout/prefixes_{step}"] = count / num_prompts
    for name, count in trees.cost.counts.items():
        figures[f"rollout/{name}"] = count / num_prompts
    return figures | _correlations(scored, path)


def _codes(trees: SearchTrees, path: Int64[np.ndarray, "C K"]) -> Int64[np.ndarray, "C K2"]:
    """What tells candidates apart: their nodes or, as all thoughts differ, the codes after them."""
    return trees.state[path[:, path.shape[1] // 2 :]] if trees.is_reasoning else path


def grouped_spearman(
    x: Shaped[np.ndarray, " C"],
    y: Shaped[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
) -> Float64[np.ndarray, " B"]:
    """Spearman's rank correlation of x and y within each group; NaN where either does not vary.

    Equal numbers share the mean of their ranks.
    """

    def centred(values: Shaped[np.ndarray, " C"]) -> Float64[np.ndarray, " C"]:
        rank = _ranks(values, group)
        return rank - (np.bincount(group, rank, num_groups) / np.maximum(size, 1))[group]

    size = np.bincount(group, minlength=num_groups)
    a, b = centred(x), centred(y)
    spread = np.bincount(group, a * a, num_groups) * np.bincount(group, b * b, num_groups)
    shared = np.bincount(group, a * b, num_groups)
    return np.where(spread > 0, shared / np.sqrt(np.where(spread > 0, spread, 1)), np.nan)


def _ranks(
    values: Shaped[np.ndarray, " C"], group: Int64[np.ndarray, " C"]
) -> Float64[np.ndarray, " C"]:
    """Rank of each value among all of its group, the groups one after another."""
    order = np.lexsort((values, group))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (np.diff(values[order]) != 0) | (np.diff(group[order]) != 0)
    first = np.flatnonzero(fresh)
    last = np.append(first[1:], len(order)) - 1
    rank = np.empty(len(order))
    rank[order] = ((first + last) / 2)[np.cumsum(fresh) - 1]
    return rank


def _correlations(scored: ScoredTrees, path: Int64[np.ndarray, "C K"]) -> dict[str, float]:
    trees, figures = scored.trees, dict[str, float]()
    reward = scored.parts.get("rule", scored.reward)
    prefix = np.zeros(len(trees.step))
    span = np.add.reduceat(np.append(trees.logprob, 0), trees.token_start[:-1])
    span = np.where(np.diff(trees.token_start) > 0, span, 0)
    for step in range(1, path.shape[1] + 1):
        at = np.flatnonzero(trees.step == step)
        prefix[at] = prefix[trees.parent[at]] + span[at]
    measures = {"logprob": prefix}
    if trees.value is not None:
        measures["value"] = trees.value
    for step in range(path.shape[1]):
        for name, of_node in measures.items():
            known = np.flatnonzero(path[:, step] != SearchTrees.NO_PARENT)
            known = known[~np.isnan(of_node[path[known, step]])]
            found = grouped_spearman(
                of_node[path[known, step]],
                reward[known],
                trees.prompt_of_candidate[known],
                len(trees),
            )
            if not np.isnan(found).all():
                figures[f"rollout/{name}_spearman_{step + 1}"] = float(np.nanmean(found))
    return figures
