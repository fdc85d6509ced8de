"""The prefix critic: its walks, its loss, and what it says of a prefix."""

import numpy as np
import pytest
import torch

from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split
from orchard.scorers.fit_critic import (
    NORM_RATE,
    NORM_START,
    TorchCriticBackend,
    Trajectories,
    measure_critic,
    sample_trajectories,
)
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import CriticConfig
from orchard.testing import tiny_catalog


def critic_of(catalog: Catalog) -> PrefixCritic:
    return PrefixCritic(catalog, max_history=3, hidden_size=16, layers=1, heads=2)


@pytest.fixture(params=[False, True], ids=["level", "varying"])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    return tiny_catalog(varying_depth=request.param)


@pytest.fixture
def split(catalog: Catalog) -> Split:
    """Histories of one item, and always the same item after the same one."""
    rows = np.arange(64) % len(catalog)
    return Split(
        user=np.arange(64),
        history=rows,
        history_start=np.arange(65),
        target=(rows * 7 + 1) % len(catalog),
    )


def walks_of(
    critic: PrefixCritic, split: Split, *, discount: float = 0.5, seed: int = 0
) -> Trajectories:
    return sample_trajectories(
        critic, split, np.arange(len(split)), contrasts=3, level_weight=(1.0, 2.0),
        discount=discount, draw=np.random.default_rng(seed),
    )  # fmt: skip


def test_walks_go_down_to_a_leaf_and_the_first_to_the_logged_item(
    catalog: Catalog, split: Split
) -> None:
    critic, trie = critic_of(catalog), catalog.trie
    walks = walks_of(critic, split)
    wide = walks.node.reshape(len(split), 4, trie.depth + 1)
    assert (wide[:, :, 0] == 0).all()
    for row in range(len(split)):
        for walk in wide[row]:
            node = torch.from_numpy(walk[walk >= 0])
            assert trie.parent(node[1:]).tolist() == node[:-1].tolist()
            assert trie.num_children(node[-1:]).tolist() == [0]
    last = wide[:, 0].max(1)
    leaf = trie.leaf(torch.from_numpy(last)).numpy()
    np.testing.assert_array_equal(leaf, catalog.leaf_of_item[split.target])
    assert (wide[:, 1:] != wide[:, :1]).any()


def test_outcomes_are_the_discounted_step_rewards_from_a_state_on(split: Split) -> None:
    catalog = tiny_catalog()
    critic = critic_of(catalog)
    walks, weights = walks_of(critic, split), np.array([1.0, 2.0, 2.0])
    wide = walks.node.reshape(len(split), 4, 4)
    outcome = walks.outcome.reshape(wide.shape)
    for row, walk in np.ndindex(*wide.shape[:2]):
        agrees = wide[row, walk, 1:] == wide[row, 0, 1:]
        shared = agrees.sum() / np.arange(1, 4)
        reward = np.concatenate([[0.0], np.where(agrees, weights, -weights * (1 - shared))])
        expected = [sum(0.5**k * r for k, r in enumerate(reward[at:])) for at in range(4)]
        np.testing.assert_allclose(outcome[row, walk], expected, atol=1e-6)


@pytest.mark.slow
def test_only_legal_codes_have_a_probability(catalog: Catalog, split: Split) -> None:
    critic, trie = critic_of(catalog), catalog.trie
    walks = walks_of(critic, split)
    _, logit = critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
    possible = logit.softmax(-1) > 0
    for row, at in zip(*np.nonzero(walks.node >= 0), strict=True):
        children = trie.children(torch.tensor([walks.node[row, at]])).node
        legal = trie.code[children].tolist() or [critic.num_actions - 1]
        assert possible[row, at].nonzero().squeeze(1).tolist() == legal
        assert walks.action[row, at] in legal


def test_a_prefix_is_worth_the_same_in_a_search_as_in_training(
    catalog: Catalog, split: Split
) -> None:
    critic = critic_of(catalog).eval()
    torch.nn.init.normal_(critic.scalar.weight)
    walks = walks_of(critic, split)
    value, _ = critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
    state = critic.read(torch.from_numpy(walks.history))
    alone, _ = critic.evaluate(state, torch.from_numpy(walks.node[:, 1]))
    torch.testing.assert_close(alone, value[:, 1])
    # An older item past the limit, and padding, change nothing.
    table = critic.table(np.array([5, 1, 2, 3, 4]), np.array([0, 4, 5]))
    near = critic.table(np.array([1, 2, 3]), np.array([0, 3]))
    torch.testing.assert_close(
        critic.read(torch.from_numpy(table))[:1], critic.read(torch.from_numpy(near))
    )


@pytest.mark.slow
def test_a_critic_learns_what_follows_a_history(catalog: Catalog, split: Split) -> None:
    critic = critic_of(catalog)
    held_out = [walks_of(critic, split, seed=99)]
    before = measure_critic(critic, held_out)
    backend = TorchCriticBackend(critic, CriticConfig(lr=1e-2, dropout=0.0))
    for seed in range(60):
        backend.learn(walks_of(critic, split, seed=seed))
    after = measure_critic(critic, held_out)
    assert before["explained"] < 0.05
    assert after["explained"] > 0.5
    assert after["choice_loss"] < 0.7 * before["choice_loss"]


@pytest.mark.parametrize(("beta", "value_weight"), [(0.5, 1.0), (0.5, 3.0), (2.0, 1.0)])
def test_the_loss_weighs_imitation_by_advantage_and_adds_the_values(
    catalog: Catalog, split: Split, beta: float, value_weight: float
) -> None:
    critic = critic_of(catalog)
    walks = walks_of(critic, split)
    with torch.no_grad():
        value, logit = critic(torch.from_numpy(walks.history), torch.from_numpy(walks.node))
    inside = walks.node >= 0
    advantage = (walks.outcome - value.numpy())[inside]
    square = np.square(advantage).mean()
    logprob = logit.log_softmax(-1).numpy()
    taken = np.take_along_axis(logprob, walks.action[..., None], -1)[..., 0][inside]
    norm = NORM_START + NORM_RATE * (square - NORM_START)
    expected = -(np.exp(beta * advantage / norm**0.5) * taken).mean() + value_weight * square / 2
    settings = CriticConfig(beta=beta, value_weight=value_weight, dropout=0.0)
    assert TorchCriticBackend(critic, settings).learn(walks) == pytest.approx(expected, rel=1e-4)
