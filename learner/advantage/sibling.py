r"""Sibling-relative credit: each node is compared with its siblings only (V-STAR, 2602.10699).

Candidates that share a long prefix get nearly equal rewards, so that a group's spread says little
about the choice that told them apart. Here a node v below prefix h is worth the mean reward of the
candidates through it, and its advantage is that mean standardised over the distinct children of h,
each of which counts once:

    A(h, v) = (mean R of G(h, v) - mu_h) / (sigma_h + eps),    sigma of the population

A prefix with one child gives 0. The objective sums A(h, v) rho(v | h) over nodes, 1 / |C| per
prompt; as all candidates through a node carry the same term, each has the weight 1 / (P |C| |G(h,
v)|) there, and their sum is the node's own term exactly. Trees of different prompts never meet.

Shapes:  B prompts   N nodes   C candidates   K steps of the longest candidate
"""

import numpy as np
from jaxtyping import Float64

from orchard.types import Advantages, ScoredTrees


def sibling(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardised among the children of one parent; every node of a prompt weighs the same."""
    trees, path = scored.trees, scored.trees.paths()
    inside = path >= 0
    through = np.bincount(path[inside], minlength=len(trees.step))
    advantage = node_advantages(scored, std_epsilon)
    size = np.diff(trees.candidate_start)[trees.prompt_of_candidate]
    share = 1 / np.maximum(1, len(trees) * size[:, None] * through[path])
    return Advantages(
        advantage=np.where(inside, advantage[path], 0).astype(np.float32),
        weight=np.where(inside, share, 0).astype(np.float32),
    )


def node_advantages(scored: ScoredTrees, std_epsilon: float) -> Float64[np.ndarray, " N"]:
    """A of each node that a candidate passes through; exactly 0 where its siblings are its equals.

    0 at roots, too, and where no candidate passes.
    """
    trees, path = scored.trees, scored.trees.paths()
    candidate, step = np.nonzero(path >= 0)
    node, num_nodes = path[candidate, step], len(trees.step)
    through = np.bincount(node, minlength=num_nodes)
    total = np.bincount(node, scored.reward[candidate].astype(np.float64), minlength=num_nodes)
    child = np.flatnonzero(through)
    parent, mean = trees.parent[child], total[child] / through[child]
    children = np.bincount(parent, minlength=num_nodes)[parent]
    centred = mean - np.bincount(parent, mean, minlength=num_nodes)[parent] / children
    # Equal means may differ from their mean by rounding, which epsilon would blow up.
    lowest, highest = np.full(num_nodes, np.inf), np.full(num_nodes, -np.inf)
    np.minimum.at(lowest, parent, mean)
    np.maximum.at(highest, parent, mean)
    centred[np.isclose(lowest[parent], highest[parent], rtol=1e-9, atol=0)] = 0
    variance = np.bincount(parent, centred**2, minlength=num_nodes)[parent] / children
    advantage = np.zeros(num_nodes)
    advantage[child] = centred / (np.sqrt(variance) + std_epsilon)
    return advantage
