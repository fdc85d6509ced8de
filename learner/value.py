r"""Train the value head: value targets of a batch's trees, and the loss.

The reward r_l of the step into each node is `ScoredTrees.node_reward` (`rewards.values`).

A candidate y passes through states s_1 .. s_L. Its targets are, with the gradient stopped,

    td            r_l + gamma V(s_{l+1}),  r_L at the last state  TD(0)
    monte_carlo   r_l + gamma r_{l+1} + .. + gamma^{L-l} r_L

and the loss is the mean squared error over all states of all candidates. A state that several
candidates share is evaluated once: each (state, next state) pair is weighted by the number of
candidates that pass through it.

Shapes:  B prompts (rows)   S slots   N nodes   C candidates   K steps   V states   D hidden width
         P = K + 1 states of the longest path, the prompt's end included
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from orchard.policy.value_head import ValueHead
from orchard.types import SearchTrees, ValueTargets


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
    head: ValueHead, hidden: Float[Tensor, "B S D"], states: ValueTargets[Tensor]
) -> Float32[Tensor, " V"]:
    """Evaluate each state from the last hidden state of every slot."""
    shift = states.row[:, None] * hidden.shape[1]
    # [V, P] slots among the slots of all rows, -1 past the state
    path = torch.where(states.path >= 0, states.path + shift, -1)
    return head(hidden.flatten(0, 1), path)


def value_loss(
    value: Float32[Tensor, " V"],
    targets: ValueTargets[Tensor],
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
