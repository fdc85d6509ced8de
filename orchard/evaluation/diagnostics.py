"""Compute diagnostics of a search from a batch of scored trees.

Shapes:  C candidates   B groups (prompts)   K steps of the longest candidate
"""

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from orchard.evaluation.ranking import diversity
from orchard.types import ScoredTrees, SearchTrees


def diagnose(scored: ScoredTrees) -> dict[str, float]:
    """Compute diversity, prefix counts and rank correlations, keyed by metric name.

    `rewards/best`: the best reward of a group, averaged over groups. `rollout/diversity`: see
    `orchard.evaluation.ranking.diversity`. `rollout/prefixes_L`: distinct prefixes of L steps per
    prompt. `rollout/NAME`: the search's own counters (see `rollout.ved`), per prompt.
    `rollout/logprob_spearman_L`, `rollout/value_spearman_L`: rank correlation of the prefixes' log-
    probability and value with the reward part "rule" (the total reward if "rule" is not scored),
    averaged over the prompts where both vary; omitted if there is no such prompt. The total reward
    may include a ranking penalty, which depends on the likelihood itself.
    """
    trees = scored.trees
    num_prompts, paths = len(trees), trees.paths()
    occupied = np.diff(trees.candidate_start) > 0
    if not occupied.any():
        return {}
    best = np.maximum.reduceat(scored.reward, trees.candidate_start[:-1][occupied])
    figures = {
        "rewards/best": float(best.mean()),
        "rollout/diversity": diversity(path=_codes(trees, paths), start=trees.candidate_start),
    }
    for step, count in enumerate(np.bincount(trees.step)[1:], 1):
        figures[f"rollout/prefixes_{step}"] = count / num_prompts
    for name, count in trees.cost.counts.items():
        figures[f"rollout/{name}"] = count / num_prompts
    return figures | _correlations(scored, paths)


def _codes(trees: SearchTrees, path: Int64[np.ndarray, "C K"]) -> Int64[np.ndarray, "C K2"]:
    """Return a path that identifies each candidate.

    It consists of tree nodes or, since all thoughts differ, of the trie states after the thoughts.
    """
    return trees.state[path[:, path.shape[1] // 2 :]] if trees.is_reasoning else path


def grouped_spearman(
    x: Shaped[np.ndarray, " C"],
    y: Shaped[np.ndarray, " C"],
    group: Int64[np.ndarray, " C"],
    num_groups: int,
) -> Float64[np.ndarray, " B"]:
    """Compute Spearman's rank correlation of x and y within each group, NaN if either is constant.

    Equal values share the mean of their ranks.
    """

    def centered(values: Shaped[np.ndarray, " C"]) -> Float64[np.ndarray, " C"]:
        rank = _ranks(values, group)
        return rank - (np.bincount(group, rank, num_groups) / np.maximum(size, 1))[group]

    size = np.bincount(group, minlength=num_groups)
    a, b = centered(x), centered(y)
    spread = np.bincount(group, a * a, num_groups) * np.bincount(group, b * b, num_groups)
    shared = np.bincount(group, a * b, num_groups)
    return np.where(spread > 0, shared / np.sqrt(np.where(spread > 0, spread, 1)), np.nan)


def _ranks(
    values: Shaped[np.ndarray, " C"], group: Int64[np.ndarray, " C"]
) -> Float64[np.ndarray, " C"]:
    """Return the rank of each value within its group, offset by the sizes of the earlier groups."""
    order = np.lexsort((values, group))
    starts_run = np.ones(len(order), bool)
    starts_run[1:] = (np.diff(values[order]) != 0) | (np.diff(group[order]) != 0)
    # first and last position of each run of equal values within a group
    first = np.flatnonzero(starts_run)
    last = np.append(first[1:], len(order)) - 1
    rank = np.empty(len(order))
    rank[order] = ((first + last) / 2)[np.cumsum(starts_run) - 1]
    return rank


def _correlations(scored: ScoredTrees, path: Int64[np.ndarray, "C K"]) -> dict[str, float]:
    """Correlate log-probability and value of the prefixes of each length with the reward."""
    trees, figures = scored.trees, dict[str, float]()
    reward = scored.parts.get("rule", scored.reward)
    prefix_logprob = np.zeros(len(trees.step))
    # log-probability of each node's own tokens (0 without tokens), then of the prefix down to it
    node_logprob = np.add.reduceat(np.append(trees.logprob, 0), trees.token_start[:-1])
    node_logprob = np.where(np.diff(trees.token_start) > 0, node_logprob, 0)
    for step in range(1, path.shape[1] + 1):
        node_index = np.flatnonzero(trees.step == step)
        prefix_logprob[node_index] = (
            prefix_logprob[trees.parent[node_index]] + node_logprob[node_index]
        )
    measures = {"logprob": prefix_logprob}
    if trees.value is not None:
        measures["value"] = trees.value
    for step in range(path.shape[1]):
        for name, node_value in measures.items():
            candidate_index = np.flatnonzero(path[:, step] != SearchTrees.NO_PARENT)
            candidate_index = candidate_index[~np.isnan(node_value[path[candidate_index, step]])]
            rho = grouped_spearman(
                node_value[path[candidate_index, step]],
                reward[candidate_index],
                trees.prompt_of_candidate[candidate_index],
                len(trees),
            )
            if not np.isnan(rho).all():
                figures[f"rollout/{name}_spearman_{step + 1}"] = float(np.nanmean(rho))
    return figures
