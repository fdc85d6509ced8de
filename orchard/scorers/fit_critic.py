r"""Train the prefix critic on walks down the trie by MARWIL (arXiv 1806.00683, section 3).

Each logged row gives one walk down to its target. A contrast follows that walk for a uniformly
drawn number of codes and then takes a random child at each node; without such walks the returns
would not vary with the prefix. A walk of L codes visits the states s_0 .. s_L; entering s_l earns
the node reward of a value head (`rewards.values.node_rewards`, by codes), and

    G_l = r_l + gamma r_{l+1} + .. + gamma^{L-l} r_L,  r_0 = 0
    loss = mean( 1/2 w (G - V)^2 - exp(beta (G - V) / c) log pi(next code) ),  c^2 a moving mean
           of (G - V)^2

over all states, where no gradient flows through the weight of the imitation term. These are the
terms of RLlib's MARWIL learner, which trains the same critic with `critic.backend = "rllib"`.

Shapes:  R rows   W history items   K walks of each row   P = L + 1 states of a walk   S = K P
         A actions
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.data.prompts import Split
from orchard.optim import make_optimizer
from orchard.registry import Facts, Registry
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import CriticConfig

NORM_START, NORM_RATE = 1.0, 0.01
"""Initial value and update rate of the moving mean c^2. RLlib's defaults 100 and 1e-8 would keep c
at 10, where the advantages of these rewards hardly change the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Walks of some rows, with the states of a row's walks concatenated, the logged walk first."""

    history: Int64[np.ndarray, "R W"]
    """Histories as returned by `PrefixCritic.table`."""
    node: Int64[np.ndarray, "R S"]
    """Trie node of each state, -1 past the end of a walk, where the other arrays are undefined."""
    action: Int64[np.ndarray, "R S"]
    """Code taken in each state; the last action is the end of an item."""
    outcome: Float32[np.ndarray, "R S"]
    """Discounted return G of each state."""


@runtime_checkable
class CriticBackend(Protocol):
    """Implementation of the updates of a critic."""

    @property
    def critic(self) -> PrefixCritic:
        """Critic that is updated in place."""
        ...

    def learn(self, walks: Trajectories) -> float:
        """Make one update and return its loss."""
        ...


def sample_trajectories(
    critic: PrefixCritic,
    split: Split,
    rows: Int64[np.ndarray, " R"],
    *,
    contrasts: int,
    level_weight: Sequence[float],
    discount: float,
    draw: np.random.Generator,
) -> Trajectories:
    """Return the logged walk and `contrasts` random walks of each row."""
    catalog, trie = critic.catalog, critic.catalog.trie
    leaf = torch.from_numpy(catalog.leaf_of_item[split.target[rows]])
    logged = trie.path(trie.node_of(leaf)).numpy()
    depth = logged.shape[1]
    contrast_depth = draw.integers(0, depth, (len(rows), contrasts))
    # [R, 1 + contrasts, depth + 1] node of each walk at each depth, -1 past its end
    node = np.zeros((len(rows), 1 + contrasts, depth + 1), np.int64)
    node[:, 0, 1:] = logged
    for level in range(depth):
        parent = torch.from_numpy(node[:, 1:, level].ravel().clip(min=0))
        count = np.where(node[:, 1:, level].ravel() < 0, 0, trie.num_children(parent).numpy())
        child_index = (draw.random(len(parent)) * count).astype(np.int64)
        random_child = np.where(count > 0, trie.first_child(parent).numpy() + child_index, -1)
        follows_logged = level < contrast_depth
        node[:, 1:, level + 1] = np.where(
            follows_logged, logged[:, None, level], random_child.reshape(follows_logged.shape)
        )
    table = critic.table(*ragged.take(split.history, split.history_start, rows))
    next_node = np.concatenate([node[:, :, 1:], np.full_like(node[:, :, :1], -1)], 2)
    action = np.where(
        next_node >= 0, trie.code.numpy()[next_node.clip(min=0)], critic.num_actions - 1
    )
    outcome = _outcomes(node, logged, level_weight=level_weight, discount=discount)
    return Trajectories(
        history=table,
        node=node.reshape(len(rows), -1),
        action=action.astype(np.int64).reshape(len(rows), -1),
        outcome=outcome.astype(np.float32).reshape(len(rows), -1),
    )


def _outcomes(
    node: Int64[np.ndarray, "R K P"],
    logged: Int64[np.ndarray, "R L"],
    *,
    level_weight: Sequence[float],
    discount: float,
) -> Float64[np.ndarray, "R K P"]:
    """Compute the return G of each state of each walk."""
    step = np.arange(1, node.shape[2])
    is_logged = (node[:, :, 1:] == logged[:, None]) & (node[:, :, 1:] >= 0)
    # A node is a prefix, so the sum counts the codes that a walk has in common with the logged one.
    common_depth = np.cumsum(is_logged, 2)
    weight = np.asarray(level_weight)[np.clip(step - 1, 0, len(level_weight) - 1)]
    reward = np.where(is_logged, weight, -weight * (1 - common_depth / step))
    outcome = np.zeros(node.shape)
    outcome[:, :, 1:] = np.where(node[:, :, 1:] >= 0, reward, 0)
    # discounted sums from the end of each walk up to the root
    for level in range(node.shape[2] - 2, -1, -1):
        outcome[:, :, level] += discount * outcome[:, :, level + 1]
    return outcome


CRITIC_BACKENDS: Registry[Callable[[PrefixCritic, CriticConfig], CriticBackend], Facts] = Registry(
    "critic trainer", ("critic.backend",), Facts()
)
"""Trainers of the critic by their name in `critic.backend`."""


@CRITIC_BACKENDS.register("torch")
class TorchCriticBackend:
    """Reference implementation of the loss above in PyTorch."""

    def __init__(self, critic: PrefixCritic, settings: CriticConfig) -> None:
        """Create the optimizer of `critic`, which is updated in place."""
        self.critic, self._settings = critic, settings
        self._optimizer = make_optimizer(critic, lr=settings.lr, weight_decay=settings.weight_decay)
        self._norm = NORM_START

    def learn(self, walks: Trajectories) -> float:
        """Make one update and return its loss."""
        value, logit = self.critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
        is_state = torch.from_numpy(walks.node >= 0)
        advantage = (torch.from_numpy(walks.outcome) - value)[is_state]
        squared_error = advantage.square().mean()
        self._norm += NORM_RATE * (squared_error.item() - self._norm)
        weight = (self._settings.beta * advantage.detach() / (1e-8 + self._norm**0.5)).exp()
        imitation = -(weight * chosen(logit, walks)[is_state]).mean()
        loss = imitation + self._settings.value_weight * 0.5 * squared_error
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def chosen(logit: Float[Tensor, "R S A"], walks: Trajectories) -> Float[Tensor, "R S"]:
    """Return the log-probability of the actions that were taken."""
    action = torch.from_numpy(walks.action)
    return logit.log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)


@torch.no_grad()
def measure_critic(critic: PrefixCritic, parts: Sequence[Trajectories]) -> dict[str, float]:
    """Evaluate values and choices on held-out walks.

    `explained` is the share of the variance of the outcomes that the values explain, over the
    states below the root; `value_loss` is half their mean squared error; `choice_loss` is the mean
    negative log-probability of a code of a logged walk.
    """
    critic.eval()
    outcome, error, surprise = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    period = len(critic.level_start)
    for walks in parts:
        value, logit = critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
        after_root: Bool[np.ndarray, " S"] = np.arange(walks.node.shape[1]) % period > 0
        is_scored = (walks.node >= 0) & after_root
        outcome.append(walks.outcome[is_scored])
        error.append(walks.outcome[is_scored] - value.numpy()[is_scored])
        first = slice(0, period - 1)
        codes = walks.action[:, first] < critic.num_actions - 1
        surprise.append(-chosen(logit, walks).numpy()[:, first][codes])
    value_error = float(np.square(np.concatenate(error)).mean())
    return {
        "explained": 1.0 - value_error / max(1e-12, float(np.concatenate(outcome).var())),
        "value_loss": 0.5 * value_error,
        "choice_loss": float(np.concatenate(surprise).mean()),
    }
