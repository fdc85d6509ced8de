"""Searches and updates on a GPU against those on the CPU."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import pack
from learner.trainer import Trainer
from orchard.policy import value_head, weights
from orchard.settings import LearnerConfig, RolloutConfig, VedConfig
from orchard.testing import TinySetup, tiny_policy, tiny_setup, tiny_thinking_setup, with_windows
from orchard.types import ScoredTrees, TrainBatch
from rollout.candidates import Candidates
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.sampling import beam_sample
from rollout.search.score_items import score_items
from rollout.search.think import search_after_thoughts
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees
from tests.fixtures.guides import random_guide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

SEARCHES: dict[str, Callable[..., Candidates]] = {
    "beam": partial(beam, width=6),
    "stop": partial(beam, width=8, count=3, prove=3),
    "beam_sample": partial(beam_sample, width=6, temperature=1.3, seed=3),
    "sample": partial(sample, count=20, temperature=1.3, seed=3),
    "ved": partial(ved, settings=VedConfig(), count=6, seed=3),
    "head": partial(beam, width=6, head=True),
}


def world_with_head() -> TinySetup:
    world = tiny_setup(lengths=(3, 17, 9), varying_depth=True)
    value_head.attach(world.model, seed=0)
    return world


def engine_on(device: str, world: TinySetup) -> TorchEngine:
    model = nn.Module.to(copy.deepcopy(world.model), device=device)
    return TorchEngine(model, world.tokenizer, world.version)


def equal(one: Candidates, other: Candidates) -> None:
    assert np.array_equal(one.start, other.start)
    assert np.array_equal(one.leaf, other.leaf)
    assert np.allclose(one.score, other.score, atol=1e-4)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_the_same_on_both(name: str) -> None:
    world = world_with_head()
    one, other = (SEARCHES[name](engine_on(d, world), world.prompts) for d in ("cpu", "cuda"))
    equal(one, other)


def test_a_guided_search_finds_the_same_on_both() -> None:
    world = tiny_setup(lengths=(3, 17, 9))
    search = partial(beam, width=6, guide=random_guide(world.catalog, seed=2), prove=4)
    one, other = (search(engine_on(d, world), world.prompts) for d in ("cpu", "cuda"))
    equal(one, other)
    assert one.proved is not None
    assert np.array_equal(one.proved, other.proved)


def test_items_have_the_same_scores_on_both() -> None:
    world = tiny_setup(lengths=(3, 17, 9))
    leaf = np.array([5, 0, 9])
    one, other = (score_items(engine_on(d, world), world.prompts, leaf) for d in ("cpu", "cuda"))
    for value, expected in zip(other, one, strict=True):
        assert np.allclose(value, expected, atol=1e-4)


def test_thoughts_are_searched_on_a_gpu() -> None:
    world = tiny_thinking_setup()
    config = RolloutConfig.model_validate(
        {"search": "think", "engine": "torch", "group_size": 4, "think": {"block_tokens": 6}}
    )
    trees = search_after_thoughts(
        engine_on("cuda", world), world.tokenizer, config, world.prompts, seed=1
    )
    assert trees.is_reasoning
    assert np.isfinite(trees.logprob).all()


def test_weights_move_to_a_gpu() -> None:
    world = tiny_setup(lengths=(3, 17))
    other = replace(world, model=tiny_policy(world.catalog, seed=4)[0])
    engine = engine_on("cuda", world)
    held = weights.snapshot(other.model)
    version = replace(world.version, digest=weights.digest(held))
    engine.load_weights(version, held)
    equal(beam(engine, world.prompts, width=5),
          beam(engine_on("cpu", other), world.prompts, width=5))  # fmt: skip


def batch_of(world: TinySetup) -> TrainBatch:
    found = beam(engine_on("cpu", world), world.prompts, width=9)
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    reward = np.random.default_rng(0).random(len(found.leaf)).astype(np.float32)
    scored = ScoredTrees(trees=trees, reward=reward, parts={})
    return pack(scored, [ESTIMATORS["group"](scored, 1e-4)], world.tokenizer)


@pytest.mark.parametrize("kind", ["full", "mistral", "gemma3"])
@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"attention": "dense"}, 1e-4),
        ({"attention": "flex"}, 1e-4),
        ({"attention": "flex", "gradient_checkpointing": True}, 1e-4),
        ({"attention": "flex", "logprob": "full"}, 1e-4),
        ({"attention": "flex", "dtype": "bfloat16"}, 0.05),
    ],
)
def test_updates_are_those_of_the_cpu(kind: str, changes: dict[str, object], bound: float) -> None:
    # FlexAttention needs heads of at least 16 on a GPU.
    world = tiny_setup(lengths=(3, 200, 90))
    if kind != "full":
        world = with_windows(world, mixed=kind == "gemma3")
    batch, outcomes = batch_of(world), []
    for device in ("cpu", "cuda"):
        own = changes if device == "cuda" else {"logprob": changes.get("logprob", "trie")}
        config = LearnerConfig.model_validate({"lr": 1e-3, "kl": {"weight": 0.1}} | own)
        policy = copy.deepcopy(world.model)
        trainer = Trainer(policy, world.tokenizer, config, total_steps=4, device=device)
        metrics = [trainer.rl_step(batch) for _ in range(3)]
        outcomes.append((trainer.score(batch), metrics))
    (score, metrics), (other_score, other_metrics) = outcomes
    assert np.abs(score - other_score).max() < 40 * bound
    assert other_metrics[0]["logprob_gap"] < max(10 * bound, metrics[0]["logprob_gap"] + bound)
    assert other_metrics[0]["surrogate"] == pytest.approx(metrics[0]["surrogate"], abs=bound)
