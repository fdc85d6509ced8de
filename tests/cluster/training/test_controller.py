"""Tolerance between search and learner log-probabilities, by precision."""

from typing import Literal

import pytest
import torch
from torch import nn

from learner.batch.sft import pack_answers
from learner.trainer import Trainer
from orchard.errors import WeightMismatchError
from orchard.settings import ClusterConfig, Config, DataConfig, LearnerConfig, RolloutConfig
from orchard.testing import TinySetup, tiny_policy, tiny_setup
from rollout.engine.torch import TorchEngine
from rollout.probe import EXACT, ROUNDED, LogprobProbe, probe_tolerance, verify

Dtype = Literal["float32", "bfloat16"]
EVERY = [(s, t) for s in ("float32", "bfloat16") for t in ("float32", "bfloat16")]


def settings(searching: Dtype, learning: Dtype, bound: float | None = None) -> Config:
    return Config(
        name="toy", data=DataConfig(path="data"), rollout=RolloutConfig(dtype=searching),
        learner=LearnerConfig(dtype=learning), cluster=ClusterConfig(probe_tolerance=bound),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_setup(level_size=(16, 16, 16), num_items=400, lengths=tuple(range(16)))


def probed(world: TinySetup, config: Config, *, seed: int) -> tuple[TorchEngine, LogprobProbe]:
    """Return an engine with the policy of `seed`, and a learner's probe of the policy of seed 0."""
    catalog, vocabulary = world.catalog, world.tokenizer
    model, _ = tiny_policy(catalog)
    learner = Trainer(model, vocabulary, config.learner, total_steps=1)
    form = vocabulary
    score = learner.score(pack_answers(world.prompts, form, world.version))
    policy, _ = tiny_policy(catalog, seed=seed)
    nn.Module.to(policy, dtype=getattr(torch, config.rollout.dtype))
    return TorchEngine(policy, vocabulary, world.version), LogprobProbe(
        prompts=world.prompts, leaf=catalog.leaf_of_item[world.prompts.target], score=score,
        tolerance=probe_tolerance(config),
    )  # fmt: skip


@pytest.mark.parametrize(("searching", "learning"), EVERY)
def test_rounding_passes_and_other_weights_do_not(
    world: TinySetup, searching: Dtype, learning: Dtype
) -> None:
    config = settings(searching, learning)
    apart = verify(*probed(world, config, seed=0))
    # Were this otherwise, one bound would do for all.
    assert (apart > EXACT) == ((searching, learning) != ("float32", "float32"))
    assert apart < probe_tolerance(config) / 2
    with pytest.raises(WeightMismatchError, match="nats from the learner's"):
        verify(*probed(world, config, seed=1))


@pytest.mark.parametrize(("searching", "learning"), EVERY)
def test_the_bound_is_that_of_the_coarser_precision_unless_one_is_set(
    searching: Dtype, learning: Dtype
) -> None:
    exact = searching == learning == "float32"
    assert probe_tolerance(settings(searching, learning)) == (EXACT if exact else ROUNDED)
    assert probe_tolerance(settings(searching, learning, bound=0.07)) == 0.07
