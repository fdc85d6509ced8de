r"""Estimate sibling-relative advantages (V-STAR, arXiv 2602.10699).

Candidates that share a long prefix get nearly equal rewards, so a group's spread says little about
the choice at which they differ. Here the value of a node v below prefix h is the mean reward of the
candidates through it, and its advantage is that mean standardized over the distinct children of h,
each of which counts once:

    A(h, v) = (mean R of G(h, v) - mu_h) / (sigma_h + eps),    sigma of the population

A prefix with one child gives 0. The objective sums A(h, v) rho(v | h) over nodes, with the factor
1 / |C| per prompt, where |C| is the prompt's number of candidates and P the number of prompts. All
candidates through a node carry the same term, so each has the weight 1 / (P |C| |G(h, v)|) at that
node, and they sum exactly to the term of the node. Nodes of different prompts are never compared.

Shapes:  B prompts   N nodes   C candidates   K steps of the longest candidate
"""

import numpy as np
from jaxtyping import Float64

from orchard.types import Advantages, ScoredTrees


def sibling(scored: ScoredTrees, std_epsilon: float) -> Advantages:
    """Standardize among the children of a parent; every node of a prompt weighs the same."""
    trees, path = scored.trees, scored.trees.paths()
    inside = path >= 0
    # [N] number of candidates through each node
    num_through = np.bincount(path[inside], minlength=len(trees.step))
    advantage = node_advantages(scored, std_epsilon)
    # [C] number of candidates in the group of each
    group_size = np.diff(trees.candidate_start)[trees.prompt_of_candidate]
    weight = 1 / np.maximum(1, len(trees) * group_size[:, None] * num_through[path])
    return Advantages(
        advantage=np.where(inside, advantage[path], 0).astype(np.float32),
        weight=np.where(inside, weight, 0).astype(np.float32),
    )


def node_advantages(scored: ScoredTrees, std_epsilon: float) -> Float64[np.ndarray, " N"]:
    """Return A of each node; exactly 0 where the means of all siblings are equal.

    Roots and nodes that no candidate passes through have 0, too.
    """
    trees, path = scored.trees, scored.trees.paths()
    # one entry per (candidate, node on its path)
    candidate, column = np.nonzero(path >= 0)
    node, num_nodes = path[candidate, column], len(trees.step)
    # [N] number and total reward of the candidates through each node
    num_through = np.bincount(node, minlength=num_nodes)
    total = np.bincount(node, scored.reward[candidate].astype(np.float64), minlength=num_nodes)
    # From here on one entry per node that a candidate passes through: its parent, its mean
    # reward, and the number of its siblings, itself included.
    child = np.flatnonzero(num_through)
    parent, mean = trees.parent[child], total[child] / num_through[child]
    num_siblings = np.bincount(parent, minlength=num_nodes)[parent]
    centered = mean - np.bincount(parent, mean, minlength=num_nodes)[parent] / num_siblings
    # Equal means may differ from their mean by rounding, which a small epsilon would amplify.
    lowest, highest = np.full(num_nodes, np.inf), np.full(num_nodes, -np.inf)
    np.minimum.at(lowest, parent, mean)
    np.maximum.at(highest, parent, mean)
    centered[np.isclose(lowest[parent], highest[parent], rtol=1e-9, atol=0)] = 0
    variance = np.bincount(parent, centered**2, minlength=num_nodes)[parent] / num_siblings
    advantage = np.zeros(num_nodes)
    advantage[child] = centered / (np.sqrt(variance) + std_epsilon)
    return advantage
