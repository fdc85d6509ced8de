"""The prefix critic from its settings to the search that it guides; RLlib and torch backends."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from cluster.cli import app as cli
from cluster.training import rllib
from cluster.training.checks import check_names
from cluster.training.rllib import RllibBackend
from cluster.training.run import prepare
from orchard import config
from orchard.catalog.catalog import Catalog
from orchard.data.prompts import Split, make_prompts
from orchard.errors import ConfigError
from orchard.policy import model
from orchard.scorers.fit_critic import TorchCriticBackend, measure_critic, sample_trajectories
from orchard.scorers.prefix_critic import PrefixCritic
from orchard.settings import Config, CriticConfig, VedConfig
from orchard.testing import tiny_catalog
from rollout.actor import RolloutWorker
from rollout.engine.payload import PayloadDecoder, PayloadEncoder
from rollout.search.ved.search import ved
from tests.fixtures.runs import TinyRun


@pytest.fixture
def file(tiny_run: TinyRun) -> Path:
    return tiny_run(
        critic={"epochs": 2, "hidden_size": 8, "layers": 1, "lr": 1e-2},
        rollout={
            "engine": "torch", "search": "ved", "group_size": 6, "threads": 1,
            "ved": {"guide": "critic", "budget": 17, "width": 4},
        },
    )  # fmt: skip


def start(settings: Config) -> None:
    """Create an SFT policy without a value head."""
    from cluster.training.run_dir import open_run_dir, save_policy
    from orchard.policy.weights import digest, snapshot
    from orchard.types import PolicyVersion

    first = prepare(settings, "sft")
    open_run_dir(first)
    weights = snapshot(model.create(first.config.model, first.tokenizer, seed=0))
    save_policy(first, first.result, PolicyVersion(step=0, digest=digest(weights)), weights)


def test_a_fitted_critic_guides_a_policy_that_has_no_head(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.load(file)
    start(settings)
    with pytest.raises(ConfigError, match="critic asks a fitted model.*orchard fit critic"):
        prepare(settings, "train")
    cli.main(["fit", "critic", str(file)])
    assert "explained" in capsys.readouterr().out
    run = prepare(settings, "train")
    assert run.critic is not None
    given = (run.config.rollout, run.policy, run.tokenizer, 0)
    prompts = make_prompts(run.tokenizer, run.train, np.arange(8))
    trees = RolloutWorker(*given, run.critic).search(prompts, seed=0)
    assert trees.value is not None
    inside = np.flatnonzero((trees.step > 0) & np.isfinite(trees.value))
    said = run.critic.values(prompts)(
        trees.prompt_of_node[inside], torch.from_numpy(trees.state[inside])
    )
    np.testing.assert_allclose(trees.value[inside], said, atol=1e-5)
    assert trees.cost.forward_tokens <= 8 * 16
    assert prepare(settings, "sft").critic is None  # who warm-starts needs none


def test_a_critic_travels_to_a_worker_without_its_catalog() -> None:
    sender, critic = PayloadEncoder(), critic_of()
    find = partial(ved, settings=VedConfig(), count=6, seed=0, critic=critic)
    first, second = sender.encode(find), sender.encode(find)
    assert [type(one) for one in first.new.values()] == [Catalog]
    assert not second.new
    arrived = PayloadDecoder(torch.device("cpu"))
    arrived.decode(first)
    again = cast(Any, arrived.decode(second)).keywords["critic"]
    table, node = torch.tensor([[3, 4, -1]]), torch.tensor([[0, 1]])
    for here, there in zip(critic.eval()(table, node), again.eval()(table, node), strict=True):
        torch.testing.assert_close(here, there)


def test_a_search_by_the_head_still_asks_for_one(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        check_names(config.load(file, ["rollout.ved.guide=head"]))
    assert refused.value.code == "config.no_values"
    check_names(config.load(file, ["model.value_head=true", "rollout.ved.guide=head"]))


def test_without_its_requirements_rllib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rllib, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"requirements/rllib\.txt"):
        RllibBackend(critic_of(), CriticConfig())


def critic_of() -> PrefixCritic:
    torch.manual_seed(3)
    return PrefixCritic(
        tiny_catalog(varying_depth=True),
        max_history=3, hidden_size=16, layers=1, heads=2, dropout=0.2,
    )  # fmt: skip


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
