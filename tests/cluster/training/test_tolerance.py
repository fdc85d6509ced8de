"""How far search and learner may be apart, by the precision that they compute in."""

from typing import Literal

import pytest
import torch
from torch import nn

from cluster.training.controller import EXACT, ROUNDED, tolerance
from learner.batch.sft import pack_answers
from learner.trainer import Learner
from orchard.data.prompts import PromptFormat
from orchard.errors import UnfitError
from orchard.settings import ClusterConfig, Config, DataConfig, LearnerConfig, RolloutConfig
from orchard.testing import World, tiny_policy, tiny_world
from rollout.engine.torch import TorchEngine
from rollout.probe import Probe, check

Dtype = Literal["float32", "bfloat16"]
EVERY = [(s, t) for s in ("float32", "bfloat16") for t in ("float32", "bfloat16")]


def settings(searching: Dtype, learning: Dtype, bound: float | None = None) -> Config:
    return Config(
        name="toy", data=DataConfig(path="data"), rollout=RolloutConfig(dtype=searching),
        learner=LearnerConfig(dtype=learning), cluster=ClusterConfig(probe_tolerance=bound),
    )  # fmt: skip


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world(level_size=(16, 16, 16), num_items=400, lengths=tuple(range(16)))


def probed(world: World, config: Config, *, seed: int) -> tuple[TorchEngine, Probe]:
    """An engine with the policy of a seed, and what a learner makes of that of seed 0."""
    catalogue, vocabulary = world.catalogue, world.vocabulary
    model, _ = tiny_policy(catalogue)
    learner = Learner(model, catalogue.trie, vocabulary, config.learner, total_steps=1)
    form = PromptFormat(catalogue=catalogue, vocabulary=vocabulary)
    score = learner.score(pack_answers(world.prompts, form, world.version))
    found, _ = tiny_policy(catalogue, seed=seed)
    nn.Module.to(found, dtype=getattr(torch, config.rollout.dtype))
    return TorchEngine(found, catalogue.trie, vocabulary, world.version), Probe(
        prompts=world.prompts, leaf=catalogue.leaf_of_item[world.prompts.target], score=score,
        tolerance=tolerance(config),
    )  # fmt: skip


@pytest.mark.parametrize(("searching", "learning"), EVERY)
def test_rounding_passes_and_other_weights_do_not(
    world: World, searching: Dtype, learning: Dtype
) -> None:
    config = settings(searching, learning)
    apart = check(*probed(world, config, seed=0))
    # Were this otherwise, one bound would do for all.
    assert (apart > EXACT) == ((searching, learning) != ("float32", "float32"))
    assert apart < tolerance(config) / 2
    with pytest.raises(UnfitError, match="nats from the learner's"):
        check(*probed(world, config, seed=1))


@pytest.mark.parametrize(("searching", "learning"), EVERY)
def test_the_bound_is_that_of_the_coarser_precision_unless_one_is_set(
    searching: Dtype, learning: Dtype
) -> None:
    exact = searching == learning == "float32"
    assert tolerance(settings(searching, learning)) == (EXACT if exact else ROUNDED)
    assert tolerance(settings(searching, learning, bound=0.07)) == 0.07
