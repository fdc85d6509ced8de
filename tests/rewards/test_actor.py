"""The reward actor answers as the function that it wraps."""

from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError

from orchard.errors import ConfigError
from orchard.settings import RewardsConfig
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, ScoredTrees
from rewards.actor import RewardWorker
from rewards.registry import RewardContext
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_cluster")
def test_the_actor_scores_as_the_function_does() -> None:
    catalog, version = tiny_catalog(), PolicyVersion(step=0, digest="0" * 64)
    model, vocabulary = tiny_policy(catalog)
    prompts = tiny_prompts(catalog, [2, 3])
    found = beam(TorchEngine(model, vocabulary, version), prompts, width=30)
    trees = build_search_trees(prompts, found, vocabulary, version)
    weights = {"rule": 1.0, "ranking": 1.0}
    known = RewardContext(catalog=catalog, settings=RewardsConfig(weights=weights))
    remote: Any = ray.remote(RewardWorker)
    actor = remote.remote(known)
    scored: ScoredTrees = ray.get([actor.score.remote(trees)])[0]
    expected = score_trees(trees, catalog, weights)
    np.testing.assert_array_equal(scored.reward, expected.reward)
    assert scored.reward.max() == 1


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_with_an_unknown_reward_does_not_start() -> None:
    unknown = RewardsConfig(weights={"rul": 1.0})
    remote: Any = ray.remote(RewardWorker)
    actor = remote.remote(RewardContext(catalog=tiny_catalog(), settings=unknown))
    with pytest.raises(ActorDiedError, match="did you mean rule") as info:
        ray.get(actor.__ray_ready__.remote())
    assert ConfigError.__name__ in str(info.value)
