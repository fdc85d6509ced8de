r"""Train the value head: dense step rewards, value targets of a batch's trees, and the loss.

At step l the reward of a prefix is w_l if the target begins with it, and otherwise
-w_l (1 - similarity), where the similarity is the cosine between the mean embedding of the
candidates through the prefix and the embedding of the target (V-STAR, arXiv 2602.10699). Where
items have no embeddings, the similarity is the share of the prefix's codes that agree with the
target, counted from the first code on. These rewards train the value head alone. Where
`learner.value.outcome` names parts of the reward, a candidate receives those at its last code
instead and nothing before.

A candidate y passes through states s_1 .. s_L. Its targets are, with the gradient stopped,

    td            r_l + gamma V(s_{l+1}),  r_L at the last state  TD(0)
    monte_carlo   r_l + gamma r_{l+1} + .. + gamma^{L-l} r_L

and the loss is the mean squared error over all states of all candidates. A state that several
candidates share is evaluated once: each (state, next state) pair is weighted by the number of
candidates that pass through it.

Shapes:  B prompts (rows)   S slots   N nodes   C candidates   K steps   V states   D hidden width
         P = K + 1 states of the longest path, the prompt's end included   I items
         E embedding width
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from learner.logprobs import ValueTensors
from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.policy.value_head import ValueHead
from orchard.types import ScoredTrees, SearchTrees, ValueTargets


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


def value_targets(
    trees: SearchTrees,
    reward: Float32[np.ndarray, " N"],
    slot: Int64[np.ndarray, " N"],
    *,
    discount: float,
) -> ValueTargets:
    """Return the states of all candidates with their rewards, outcomes and weights.

    Args:
        trees: trees of the batch.
        reward: reward of the step into each node.
        slot: slot of the last token of each node within its row; of the prompt's end at a root.
        discount: gamma of the Monte Carlo outcome.
    """
    path = trees.paths()
    # [N] numbers of candidates that pass through each node, and that end there
    num_through = np.bincount(path[path >= 0], minlength=len(trees.step))
    num_ending = np.bincount(trees.candidate, minlength=len(trees.step))
    outcome = _outcomes(trees, reward, num_through, discount)
    # [V] node of each state
    states = np.flatnonzero((num_through > 0) & (trees.step > 0))
    total = max(1, int(num_through[states].sum()))
    is_first = trees.step[trees.parent[states]] == 0
    return ValueTargets(
        row=trees.prompt_of_node[states],
        path=_state_paths(trees, states, slot).astype(np.int32),
        reward=reward[states],
        outcome=outcome[states].astype(np.float32),
        through=(num_through[states] / total).astype(np.float32),
        entered=np.where(is_first, 0, num_through[states] / total).astype(np.float32),
        ending=(num_ending[states] / total).astype(np.float32),
    )


def state_values(
    head: ValueHead, hidden: Float[Tensor, "B S D"], states: ValueTensors
) -> Float32[Tensor, " V"]:
    """Evaluate each state from the last hidden state of every slot."""
    shift = states.row[:, None] * hidden.shape[1]
    # [V, P] slots among the slots of all rows, -1 past the state
    path = torch.where(states.path >= 0, states.path + shift, -1)
    return head(hidden.flatten(0, 1), path)


def value_loss(
    value: Float32[Tensor, " V"],
    targets: ValueTensors,
    *,
    discount: float,
    target: Literal["td", "monte_carlo"],
) -> Float32[Tensor, ""]:
    """Return the mean squared error over all states of all candidates of the whole batch."""
    if target == "monte_carlo":
        return (targets.through * (value - targets.outcome) ** 2).sum()
    state_index = torch.arange(len(value), device=value.device)
    depth = (targets.path >= 0).sum(1)
    # [V] slots of the last token of each state, and of the state before it on the path
    slot = targets.path.gather(1, (depth - 1)[:, None]).squeeze(1)
    parent_slot = targets.path.gather(1, (depth - 2)[:, None]).squeeze(1)
    # The slot of its last token identifies a state within its row. A first state's parent, the
    # prompt's end, is no state; it maps to state 0 here and has `entered` = 0.
    num_rows = int(targets.row.max()) + 1 if len(value) else 1
    width = int(targets.path.max()) + 1 if len(value) else 1
    state_at = torch.zeros(num_rows, width).long()
    state_at = state_at.to(value.device)
    state_at[targets.row, slot] = state_index
    parent = state_at[targets.row, parent_slot]
    # TD(0) target of the parent, for the candidates that go on to this state
    bootstrapped = targets.reward[parent] + discount * value.detach()
    continued = targets.entered * (value[parent] - bootstrapped) ** 2
    ended = targets.ending * (value - targets.reward) ** 2
    return (continued + ended).sum()


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


def _outcomes(
    trees: SearchTrees,
    reward: Float32[np.ndarray, " N"],
    num_through: Int64[np.ndarray, " N"],
    discount: float,
) -> Float64[np.ndarray, " N"]:
    """Return the discounted reward from each node on, averaged over the candidates through it."""
    # [N] sum over candidates, complete from the current step down
    total = num_through * reward.astype(np.float64)
    for step in range(int(trees.step.max(initial=0)), 1, -1):
        nodes = np.flatnonzero(trees.step == step)
        np.add.at(total, trees.parent[nodes], discount * total[nodes])
    return total / np.maximum(num_through, 1)


def _state_paths(
    trees: SearchTrees, states: Int64[np.ndarray, " V"], slot: Int64[np.ndarray, " N"]
) -> Int64[np.ndarray, "V P"]:
    """List the slots of the prompt's end and of the nodes down to each state, -1 past it."""
    # [V, P] filled from the state up to its root, column by step
    path = np.full((len(states), int(trees.step.max(initial=0)) + 1), -1, np.int64)
    node, rows = states.copy(), np.arange(len(states))
    inside: Bool[np.ndarray, " V"] = np.ones(len(states), bool)
    while inside.any():
        path[rows[inside], trees.step[node[inside]]] = slot[node[inside]]
        inside &= trees.step[node] > 0
        node = np.where(inside, trees.parent[node], node)
    return path
