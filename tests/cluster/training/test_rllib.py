"""RLlib backend of the critic against that of torch."""

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cluster.training import rllib
from cluster.training.rllib import RllibBackend
from orchard.data.prompts import Split
from orchard.errors import ConfigError
from orchard.scorers.fit_critic import TorchCriticBackend, measure_critic, sample_trajectories
from orchard.settings import CriticConfig
from tests.fixtures.values import critic_of


def test_without_its_requirements_rllib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rllib, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"requirements/rllib\.txt"):
        RllibBackend(critic_of(), CriticConfig())


def by(
    backend: Callable[..., TorchCriticBackend | RllibBackend],
) -> tuple[list[float], dict[str, float]]:
    """Return the losses of some updates, and the critic's metrics on held-out trajectories."""
    critic, rows = critic_of(), np.arange(40)
    split = Split(
        user=rows, history=rows % 29, history_start=np.arange(41), target=(rows * 7 + 1) % 29
    )
    learner = backend(critic, CriticConfig(lr=1e-2, weight_decay=0.1))
    torch.manual_seed(4)
    losses: list[float] = []
    for seed in range(21):
        walks = sample_trajectories(
            critic, split, rows, contrasts=3, level_weight=(0.3, 0.5, 1.0), discount=0.9,
            draw=np.random.default_rng(seed),
        )  # fmt: skip
        if seed == 20:
            return losses, measure_critic(critic, [walks])
        losses.append(learner.learn(walks))
    raise AssertionError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None,
    reason="RLlib's requirements (requirements/rllib.txt) are not installed",
)
def test_rllib_makes_the_updates_of_the_reference() -> None:
    (ours, good), (theirs, same) = by(TorchCriticBackend), by(RllibBackend)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert ours[-1] < ours[0]
    for name, value in good.items():
        assert same[name] == pytest.approx(value, rel=1e-3)
