"""The advantage of logged draws is the gradient of the self-normalized estimate."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.advantage.estimators import compute_advantages
from learner.advantage.logged import importance_weights, snips_advantages
from orchard.errors import DataError
from orchard.settings import LearnerConfig
from orchard.testing import tiny_catalog
from orchard.types import ScoredTrees, SearchTrees

Grow = Callable[..., SearchTrees]
CATALOG = tiny_catalog(seed=3, num_items=40)


def scored(
    trees_with: Grow, score: np.ndarray, logged: np.ndarray | None, reward: np.ndarray
) -> ScoredTrees:
    trees = trees_with(CATALOG, [[leaf] for leaf in range(len(score))], targets=[0] * len(score))
    prompts = replace(trees.prompts, logged=logged)
    trees = replace(trees, prompts=prompts, score=score.astype(np.float32))
    return ScoredTrees(trees=trees, reward=reward.astype(np.float32), parts={})


def test_the_advantage_is_the_gradient_of_the_estimate(trees_with: Grow) -> None:
    rng = np.random.default_rng(0)
    drawn, reward = rng.integers(5, size=12), rng.integers(3, size=12).astype(np.float64)
    behavior = torch.log_softmax(torch.tensor(rng.normal(size=5)), 0)[drawn]
    logits = torch.tensor(rng.normal(size=5), requires_grad=True)
    target = torch.log_softmax(logits, 0)[drawn]
    weight = (target - behavior).exp()
    estimate = (weight * torch.tensor(reward)).sum() / weight.sum()
    (wanted,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    batch = scored(trees_with, target.detach().numpy(), behavior.numpy().astype(np.float32), reward)
    advantage = torch.tensor(snips_advantages(batch, 1e9))
    (found,) = torch.autograd.grad((advantage * target).mean(), logits)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_weights_are_truncated_and_advantages_add_up_to_nothing(trees_with: Grow) -> None:
    score, logged = np.log(np.array([0.5, 0.4, 0.001])), np.log(np.array([0.01, 0.4, 0.5]))
    batch = scored(trees_with, score, logged.astype(np.float32), np.array([1.0, 0.0, 1.0]))
    weight = importance_weights(batch, 10.0)
    np.testing.assert_allclose(weight, [10.0, 1.0, 0.002], rtol=1e-5)
    config = LearnerConfig(estimator="snips", weight_clip=10.0)
    (credit,) = compute_advantages(batch, config)
    found = credit.advantage[:, 0]
    assert found.sum() == pytest.approx(0, abs=1e-5)
    surplus = np.array([1, 0, 1]) - 10.002 / 11.002
    np.testing.assert_allclose(found, 3 * weight * surplus / 11.002, rtol=1e-4)


def test_draws_of_unknown_probability_are_refused(trees_with: Grow) -> None:
    batch = scored(trees_with, np.zeros(2), None, np.ones(2))
    with pytest.raises(DataError, match='rollout.search = "logged"'):
        snips_advantages(batch, 10.0)
