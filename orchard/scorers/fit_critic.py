r"""What the prefix critic is taught: walks down the trie, by MARWIL (arXiv 1806.00683, section 3).

Of each logged row, one walk goes down to the item that followed. Contrasts follow it for a while,
each a number of codes drawn evenly, and then take any child at each node: without walks that go
wrong, a return would have nothing to tell. A walk of L codes visits the states s_0 .. s_L; entering
s_l earns what it earns a value head (`learner.value.node_rewards`, by codes), and

    G_l = r_l + gamma r_{l+1} + .. + gamma^{L-l} r_L,  r_0 = 0
    loss = mean( 1/2 w (G - V)^2 - exp(beta (G - V) / c) log pi(next code) ),  c^2 a moving mean
           of (G - V)^2

over all states, the weight of the imitation with the gradient stopped. These are the terms of
RLlib's MARWIL learner, which trains the same critic behind `critic.backend = "rllib"`.

Shapes:  R rows   W history items   K walks of each row   P = L + 1 states of a walk   S = K P
         A actions
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.data.prompts import Split
from orchard.optim import make_optimizer
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import CriticConfig

NORM_START, NORM_RATE = 1.0, 0.01
"""Of the moving mean c^2: its first value, and the share of a batch in it. RLlib's own 100 and 1e-8
would leave c at 10, where no advantage of these rewards makes a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Walks of some rows; the states of a row's walks follow one another, the logged walk first."""

    history: Int64[np.ndarray, "R W"]
    """As `Critic.table` has it."""
    node: Int64[np.ndarray, "R S"]
    """-1 past the end of a walk, where the other arrays mean nothing."""
    action: Int64[np.ndarray, "R S"]
    outcome: Float32[np.ndarray, "R S"]


@runtime_checkable
class CriticBackend(Protocol):
    """Updates a critic."""

    @property
    def critic(self) -> PrefixCritic:
        """The critic that is updated in place."""
        ...

    def learn(self, walks: Trajectories) -> float:
        """One update; its loss."""
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
    """The logged walk of each row and as many contrasts as asked for."""
    catalog, trie = critic.catalog, critic.catalog.trie
    leaf = torch.from_numpy(catalog.leaf_of_item[split.target[rows]])
    logged = trie.path(trie.node_of(leaf)).numpy()
    depth = logged.shape[1]
    leaves_at = draw.integers(0, depth, (len(rows), contrasts))
    node = np.zeros((len(rows), 1 + contrasts, depth + 1), np.int64)
    node[:, 0, 1:] = logged
    for level in range(depth):
        above = torch.from_numpy(node[:, 1:, level].ravel().clip(min=0))
        count = np.where(node[:, 1:, level].ravel() < 0, 0, trie.num_children(above).numpy())
        place = (draw.random(len(above)) * count).astype(np.int64)
        taken = np.where(count > 0, trie.first_child(above).numpy() + place, -1)
        follows = level < leaves_at
        node[:, 1:, level + 1] = np.where(
            follows, logged[:, None, level], taken.reshape(follows.shape)
        )
    table = critic.table(*ragged.take(split.history, split.history_start, rows))
    after = np.concatenate([node[:, :, 1:], np.full_like(node[:, :, :1], -1)], 2)
    action = np.where(after >= 0, trie.code.numpy()[after.clip(min=0)], critic.num_actions - 1)
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
    """G of each state of each walk."""
    step = np.arange(1, node.shape[2])
    agrees = (node[:, :, 1:] == logged[:, None]) & (node[:, :, 1:] >= 0)
    # Nodes are prefixes, so that a walk agrees with the logged one up to where it leaves it.
    common = np.cumsum(agrees, 2)
    weight = np.asarray(level_weight)[np.clip(step - 1, 0, len(level_weight) - 1)]
    reward = np.where(agrees, weight, -weight * (1 - common / step))
    outcome = np.zeros(node.shape)
    outcome[:, :, 1:] = np.where(node[:, :, 1:] >= 0, reward, 0)
    for level in range(node.shape[2] - 2, -1, -1):
        outcome[:, :, level] += discount * outcome[:, :, level + 1]
    return outcome


class TorchCriticBackend:
    """The reference: the loss above, in plain torch."""

    def __init__(self, critic: PrefixCritic, settings: CriticConfig) -> None:
        """Update `critic` in place."""
        self.critic, self._settings = critic, settings
        self._optimizer = make_optimizer(critic, lr=settings.lr, weight_decay=settings.weight_decay)
        self._norm = NORM_START

    def learn(self, walks: Trajectories) -> float:
        """One update; its loss."""
        value, logit = self.critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
        inside = torch.from_numpy(walks.node >= 0)
        advantage = (torch.from_numpy(walks.outcome) - value)[inside]
        square = advantage.square().mean()
        self._norm += NORM_RATE * (square.item() - self._norm)
        weight = (self._settings.beta * advantage.detach() / (1e-8 + self._norm**0.5)).exp()
        imitation = -(weight * chosen(logit, walks)[inside]).mean()
        loss = imitation + self._settings.value_weight * 0.5 * square
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.item()


def chosen(logit: Float[Tensor, "R S A"], walks: Trajectories) -> Float[Tensor, "R S"]:
    """Log-probability of the actions that were taken."""
    action = torch.from_numpy(walks.action)
    return logit.log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)


@torch.no_grad()
def measure_critic(critic: PrefixCritic, parts: Sequence[Trajectories]) -> dict[str, float]:
    """How good values and choices are on walks that were not learned from.

    `explained` is the share of the variance of the outcomes that the values explain, the states
    after the root alone; `value_loss` half their mean squared error; `choice_loss` the mean
    negative log-probability of a code of a logged walk.
    """
    critic.eval()
    outcome, error, surprise = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    period = len(critic.level_start)
    for walks in parts:
        value, logit = critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
        late: Bool[np.ndarray, " S"] = np.arange(walks.node.shape[1]) % period > 0
        inside = (walks.node >= 0) & late
        outcome.append(walks.outcome[inside])
        error.append(walks.outcome[inside] - value.numpy()[inside])
        first = slice(0, period - 1)
        codes = walks.action[:, first] < critic.num_actions - 1
        surprise.append(-chosen(logit, walks).numpy()[:, first][codes])
    square = float(np.square(np.concatenate(error)).mean())
    return {
        "explained": 1.0 - square / max(1e-12, float(np.concatenate(outcome).var())),
        "value_loss": 0.5 * square,
        "choice_loss": float(np.concatenate(surprise).mean()),
    }
