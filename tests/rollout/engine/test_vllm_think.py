"""Thoughts written by vLLM and codes searched in its worker, against the reference engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from learner.advantage.estimators import compute_advantages
from learner.batch.pack import pack
from learner.logprobs import choice_logprobs, to_tensors
from orchard.settings import LearnerConfig, RolloutConfig
from orchard.testing import TinySetup, tiny_thinking_setup
from orchard.types import ScoredTrees, SearchTrees
from rewards.steps import add_step_rewards
from rollout.actor import RolloutWorker
from rollout.candidates import Candidates

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

SETTINGS = {
    "search": "think", "group_size": 8, "threads": 1, "kv_cache_gib": 0.125, "temperature": 0.8,
    "think": {"block_tokens": 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def world() -> TinySetup:
    return tiny_thinking_setup(lengths=(2, 9, 4, 12))


@pytest.fixture(scope="module")
def folder(world: TinySetup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def actor(ray_cluster: None, world: TinySetup, folder: Path) -> Iterator[Any]:
    config = RolloutConfig.model_validate(SETTINGS)
    remote: Any = ray.remote(RolloutWorker)
    handle = remote.options(num_cpus=1).remote(config, folder, world.tokenizer, 0)
    yield handle
    ray.kill(handle)


def test_text_and_codes_have_the_learners_logprobs(actor: Any, world: TinySetup) -> None:
    trees: SearchTrees = ray.get(actor.search.remote(world.prompts, 5))
    assert np.diff(trees.candidate_start).tolist() == [8] * 4
    zero = np.zeros(len(trees.leaf), np.float32)
    judged = add_step_rewards(ScoredTrees(trees=trees, reward=zero, parts={}), world.catalog)
    credits = compute_advantages(judged, LearnerConfig(estimator="sapo"))
    batch = pack(judged, credits, world.tokenizer)
    tensors = to_tensors(batch)
    with torch.no_grad():
        found, _ = choice_logprobs(world.model, tensors, world.tokenizer, temperature=0.8)
    text = batch.state == SearchTrees.FREE_TEXT
    difference = (found - tensors.behaviour_logprob).abs().numpy()
    assert text.sum() > 32
    assert (~text).sum() > 32
    assert difference[text].max() < 1e-5
    assert difference[~text].max() < 1e-5
    again: SearchTrees = ray.get(actor.search.remote(world.prompts, 5))
    np.testing.assert_array_equal(again.token, trees.token)


def test_a_greedy_thought_and_its_beam_are_those_of_the_reference(
    actor: Any, world: TinySetup, folder: Path
) -> None:
    config = RolloutConfig.model_validate(SETTINGS | {"engine": "torch"})
    reference = RolloutWorker(config, folder, world.tokenizer, seed=0)
    found: Candidates = ray.get(actor.rank.remote(world.prompts, 6, True))
    expected = reference.rank(world.prompts, 6, thinking=True)
    np.testing.assert_array_equal(found.leaf, expected.leaf)
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
    assert found.cost.counts == expected.cost.counts


def test_contexts_beyond_one_pass_are_drawn_as_alone(actor: Any) -> None:
    """More than 8,192 tokens: a context cut in two would lose its place in its own draws."""
    prompts = tiny_thinking_setup(lengths=(12,) * 120).prompts
    length = len(prompts.token) // len(prompts)
    # But for whole pages of 32 tokens, each of the eight samples computes its own context.
    assert (length + 7 * (length % 32)) * len(prompts) > 8192
    last = np.array([len(prompts) - 1])
    trees: SearchTrees = ray.get(actor.search.remote(prompts, 5))
    alone: SearchTrees = ray.get(actor.search.remote(prompts.select(last), 5))
    np.testing.assert_array_equal(trees.select(last).token, alone.token)
