"""Reward the steps into the nodes of search trees: the rewards that train the value head alone.

At step l the reward of a prefix is w_l if the target begins with it, and otherwise
-w_l (1 - similarity), where the similarity is the cosine between the mean embedding of the
candidates through the prefix and the embedding of the target (V-STAR, arXiv 2602.10699). Where
items have no embeddings, the similarity is the share of the prefix's codes that agree with the
target, counted from the first code on. These rewards train the value head alone. Where
`learner.value.outcome` names parts of the reward, a candidate receives those at its last code
instead and nothing before.

Shapes:  N nodes   C candidates   I items   E embedding width
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.settings import ValueConfig
from orchard.types import ScoredTrees, SearchTrees


def add_value_rewards(
    scored: ScoredTrees,
    catalog: Catalog,
    config: ValueConfig,
    *,
    embedding: Float32[np.ndarray, "I E"] | None = None,
) -> ScoredTrees:
    """Add the rewards of nodes: those of outcomes where `config` names some, else dense ones."""
    if config.outcome:
        return replace(scored, node_reward=outcome_rewards(scored, config.outcome))
    weight, trees = config.level_weight, scored.trees
    reward = node_rewards(trees, catalog, level_weight=weight, embedding=embedding)
    return replace(scored, node_reward=reward)


def node_rewards(
    trees: SearchTrees,
    catalog: Catalog,
    *,
    level_weight: Sequence[float],
    embedding: Float32[np.ndarray, "I E"] | None = None,
) -> Float32[np.ndarray, " N"]:
    """Return the reward of the step into each node; 0 at roots and in free text.

    Args:
        trees: trees whose nodes are scored, each by all the candidates through it.
        catalog: catalog that they were grown on.
        level_weight: w of steps 1, 2, ...; the last weight also applies to all deeper steps.
        embedding: embedding of each item; without it, codes are compared.
    """
    step = trees.step
    in_trie = (step > 0) & (trees.state != SearchTrees.FREE_TEXT)
    # [N] leading codes in common with the target; equal to the step where the prefix is right
    common = _common_codes(trees, catalog)
    if embedding is None:
        similarity = common / np.maximum(step, 1)
    else:
        similarity = _similarities(trees, catalog, embedding)
    weight = np.asarray(level_weight)[np.clip(step - 1, 0, len(level_weight) - 1)]
    reward = np.where(common == step, weight, -weight * (1 - similarity))
    return np.where(in_trie, reward, 0).astype(np.float32)


def outcome_rewards(scored: ScoredTrees, weights: Mapping[str, float]) -> Float32[np.ndarray, " N"]:
    """Return the weighted parts of the reward at the nodes that end candidates, 0 elsewhere.

    A node that ends several candidates has their mean.

    Args:
        scored: trees with the parts of their reward.
        weights: weights of the parts, by name.
    """
    trees = scored.trees
    num_nodes = len(trees.step)
    # [C] weighted reward of each candidate
    reward = sum((w * scored.parts[name] for name, w in weights.items()), np.zeros(len(trees.leaf)))
    # [N] number and total reward of the candidates that end at each node
    num_ending = np.bincount(trees.candidate, minlength=num_nodes)
    total = np.bincount(trees.candidate, reward, minlength=num_nodes)
    return (total / np.maximum(num_ending, 1)).astype(np.float32)


def _common_codes(trees: SearchTrees, catalog: Catalog) -> Int64[np.ndarray, " N"]:
    """Count the codes that each prefix shares with its target, from the first code on."""
    trie, leaf = catalog.trie, catalog.leaf_of_item[trees.prompts.target]
    # [B, level] trie nodes on the path of each prompt's target
    target_path = trie.path(trie.node_of(torch.from_numpy(leaf))).numpy()
    # Nodes of the trie are prefixes: a node is on the target's path iff its whole prefix agrees.
    level = np.clip(trees.step - 1, 0, target_path.shape[1] - 1)
    agrees = (trees.step > 0) & (trees.state == target_path[trees.prompt_of_node, level])
    # [N] becomes the number of agreeing nodes on the path down to each node
    common = agrees.astype(np.int64)
    for step in range(2, int(trees.step.max(initial=0)) + 1):
        nodes = np.flatnonzero(trees.step == step)
        common[nodes] += common[trees.parent[nodes]]
    return common


def _similarities(
    trees: SearchTrees, catalog: Catalog, embedding: Float32[np.ndarray, "I E"]
) -> Float64[np.ndarray, " N"]:
    """Return the cosine between each node's mean candidate embedding and the target's embedding.

    Items that share a semantic ID are indistinguishable: a leaf has the mean of their embeddings.
    """
    leaf_start = catalog.leaf_start[trees.leaf]
    leaf_size = catalog.leaf_start[trees.leaf + 1] - leaf_start
    # items of all candidates' leaves, flat
    item = catalog.item_of_leaf[ragged.ranges(leaf_start, leaf_size)]
    candidate_of_item = np.repeat(np.arange(len(leaf_size)), leaf_size)
    # [C, E] mean embedding of each candidate's leaf
    candidate_embedding = np.zeros((len(leaf_size), embedding.shape[1]))
    np.add.at(candidate_embedding, candidate_of_item, embedding[item])
    candidate_embedding /= leaf_size[:, None]
    path = trees.paths()
    candidate, column = np.nonzero(path >= 0)
    # [N, E] sum over the candidates through each node; the cosine ignores its scale
    total = np.zeros((len(trees.step), embedding.shape[1]))
    np.add.at(total, path[candidate, column], candidate_embedding[candidate])
    target = embedding[trees.prompts.target[trees.prompt_of_node]].astype(np.float64)
    norm = np.linalg.norm(total, axis=1) * np.linalg.norm(target, axis=1)
    return (total * target).sum(1) / np.maximum(norm, 1e-12)
