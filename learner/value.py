r"""What the value head is taught: dense step rewards, and targets over the trees of a batch.

At step l a prefix earns w_l if the target begins with it, and else -w_l (1 - similarity), where the
similarity compares the mean embedding of the candidates behind the prefix with the target's own
(V-STAR, arXiv 2602.10699). Where items have no embeddings, it is the share of the prefix's codes
that it has in common with the target from the first code on. These rewards train the value alone.
Where `learner.value.outcome` names parts of the reward, a candidate earns those at its last code
instead, and nothing on the way.

A candidate y passes through states s_1 .. s_L. Its targets are, with the gradient stopped,

    td            r_l + gamma V(s_{l+1}),  r_L at its end         TD(0)
    monte_carlo   r_l + gamma r_{l+1} + .. + gamma^{L-l} r_L

and the loss is the mean squared error over all states of all candidates. States that candidates
share are evaluated once: each (state, next state) counts as often as candidates take it.

Shapes:  B prompts (rows)   S slots   N nodes   C candidates   K steps   V states   D hidden width
         P = K + 1 states of the longest path, the prompt's end included   I items   E of embeddings
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
    """Reward of the step into each node; 0 at roots and in free text.

    Args:
        trees: whose nodes are judged; all candidates through a node are its bucket.
        catalog: that they were grown on.
        level_weight: w of steps 1, 2, ...; the last one also of all deeper steps.
        embedding: of each item; without it, codes are compared.
    """
    step = trees.step
    bound = (step > 0) & (trees.state != SearchTrees.FREE_TEXT)
    common = _common_codes(trees, catalog)
    if embedding is None:
        similarity = common / np.maximum(step, 1)
    else:
        similarity = _similarities(trees, catalog, embedding)
    weight = np.asarray(level_weight)[np.clip(step - 1, 0, len(level_weight) - 1)]
    reward = np.where(common == step, weight, -weight * (1 - similarity))
    return np.where(bound, reward, 0).astype(np.float32)


def outcome_rewards(scored: ScoredTrees, weights: Mapping[str, float]) -> Float32[np.ndarray, " N"]:
    """Some parts of the reward, earned where a candidate ends; 0 at all other nodes.

    Candidates that end at one node earn their mean there.

    Args:
        scored: trees with the parts of their reward.
        weights: of the parts, by name.
    """
    trees = scored.trees
    size = len(trees.step)
    earned = sum((w * scored.parts[name] for name, w in weights.items()), np.zeros(len(trees.leaf)))
    ending = np.bincount(trees.candidate, minlength=size)
    total = np.bincount(trees.candidate, earned, minlength=size)
    return (total / np.maximum(ending, 1)).astype(np.float32)


def value_targets(
    trees: SearchTrees,
    reward: Float32[np.ndarray, " N"],
    slot: Int64[np.ndarray, " N"],
    *,
    discount: float,
) -> ValueTargets:
    """The states of all candidates, with what each is to be worth.

    Args:
        trees: of the batch.
        reward: of the step into each node.
        slot: of the last token of each node within its row; of the prompt's end at a root.
        discount: gamma of the Monte-Carlo outcome.
    """
    path = trees.paths()
    through = np.bincount(path[path >= 0], minlength=len(trees.step))
    ending = np.bincount(trees.candidate, minlength=len(trees.step))
    outcome = _outcomes(trees, reward, through, discount)
    states = np.flatnonzero((through > 0) & (trees.step > 0))
    total = max(1, int(through[states].sum()))
    first = trees.step[trees.parent[states]] == 0
    return ValueTargets(
        row=trees.prompt_of_node[states],
        path=_state_paths(trees, states, slot).astype(np.int32),
        reward=reward[states],
        outcome=outcome[states].astype(np.float32),
        through=(through[states] / total).astype(np.float32),
        entered=np.where(first, 0, through[states] / total).astype(np.float32),
        ending=(ending[states] / total).astype(np.float32),
    )


def state_values(
    head: ValueHead, hidden: Float[Tensor, "B S D"], states: ValueTensors
) -> Float32[Tensor, " V"]:
    """Value of each state, from the last hidden state of every slot."""
    shift = states.row[:, None] * hidden.shape[1]
    path = torch.where(states.path >= 0, states.path + shift, -1)
    return head(hidden.flatten(0, 1), path)


def value_loss(
    value: Float32[Tensor, " V"],
    targets: ValueTensors,
    *,
    discount: float,
    target: Literal["td", "monte_carlo"],
) -> Float32[Tensor, ""]:
    """Mean squared error to the targets over all states of all candidates of the whole batch."""
    if target == "monte_carlo":
        return (targets.through * (value - targets.outcome) ** 2).sum()
    entry = torch.arange(len(value), device=value.device)
    depth = (targets.path >= 0).sum(1)
    own = targets.path.gather(1, (depth - 1)[:, None]).squeeze(1)
    above = targets.path.gather(1, (depth - 2)[:, None]).squeeze(1)
    # A state is known by the slot of its last token; that of a first state's parent is no state.
    width = int(targets.path.max()) + 1 if len(value) else 1
    place = torch.zeros(int(targets.row.max()) + 1 if len(value) else 1, width).long()
    place = place.to(value.device)
    place[targets.row, own] = entry
    parent = place[targets.row, above]
    promised = targets.reward[parent] + discount * value.detach()
    continued = targets.entered * (value[parent] - promised) ** 2
    ended = targets.ending * (value - targets.reward) ** 2
    return (continued + ended).sum()


def _common_codes(trees: SearchTrees, catalog: Catalog) -> Int64[np.ndarray, " N"]:
    """Number of codes that each prefix shares with its target from the first on."""
    trie, leaf = catalog.trie, catalog.leaf_of_item[trees.prompts.target]
    wanted = trie.path(trie.node_of(torch.from_numpy(leaf))).numpy()
    # Nodes of the trie are prefixes: a node is on the target's path iff its whole prefix agrees.
    level = np.clip(trees.step - 1, 0, wanted.shape[1] - 1)
    agrees = (trees.step > 0) & (trees.state == wanted[trees.prompt_of_node, level])
    common = agrees.astype(np.int64)
    for step in range(2, int(trees.step.max(initial=0)) + 1):
        at = np.flatnonzero(trees.step == step)
        common[at] += common[trees.parent[at]]
    return common


def _similarities(
    trees: SearchTrees, catalog: Catalog, embedding: Float32[np.ndarray, "I E"]
) -> Float64[np.ndarray, " N"]:
    """Cosine between the mean embedding of the candidates behind a node and the target's.

    Items that share a semantic ID cannot be told apart: a leaf has the mean of their embeddings.
    """
    first = catalog.leaf_start[trees.leaf]
    size = catalog.leaf_start[trees.leaf + 1] - first
    member, owner = catalog.item_of_leaf[ragged.ranges(first, size)], np.arange(len(size))
    of_leaf = np.zeros((len(size), embedding.shape[1]))
    np.add.at(of_leaf, np.repeat(owner, size), embedding[member])
    of_leaf /= size[:, None]
    path = trees.paths()
    candidate, step = np.nonzero(path >= 0)
    total = np.zeros((len(trees.step), embedding.shape[1]))
    np.add.at(total, path[candidate, step], of_leaf[candidate])
    wanted = embedding[trees.prompts.target[trees.prompt_of_node]].astype(np.float64)
    norm = np.linalg.norm(total, axis=1) * np.linalg.norm(wanted, axis=1)
    return (total * wanted).sum(1) / np.maximum(norm, 1e-12)


def _outcomes(
    trees: SearchTrees,
    reward: Float32[np.ndarray, " N"],
    through: Int64[np.ndarray, " N"],
    discount: float,
) -> Float64[np.ndarray, " N"]:
    """Mean over the candidates through a node of their discounted rewards from it on."""
    total = through * reward.astype(np.float64)
    for step in range(int(trees.step.max(initial=0)), 1, -1):
        at = np.flatnonzero(trees.step == step)
        np.add.at(total, trees.parent[at], discount * total[at])
    return total / np.maximum(through, 1)


def _state_paths(
    trees: SearchTrees, states: Int64[np.ndarray, " V"], slot: Int64[np.ndarray, " N"]
) -> Int64[np.ndarray, "V P"]:
    """Slots of the prompt's end and of the nodes down to each state, -1 past it."""
    path = np.full((len(states), int(trees.step.max(initial=0)) + 1), -1, np.int64)
    node, rows = states.copy(), np.arange(len(states))
    inside: Bool[np.ndarray, " V"] = np.ones(len(states), bool)
    while inside.any():
        path[rows[inside], trees.step[node[inside]]] = slot[node[inside]]
        inside &= trees.step[node] > 0
        node = np.where(inside, trees.parent[node], node)
    return path
